"""A run's folder that is deleted, moved or replaced is noticed, and told once a minute."""

import logging
import threading

import pytest

from distrain.errors import RunRefused
from distrain.runfolder import watch as folderwatch
from distrain.runfolder.watch import FolderWatch


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    return run


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_folder_that_vanishes_is_refused_at_the_end(run, how):
    with FolderWatch(str(run)) as watch:
        assert not watch.is_gone()
        (run / "file").touch()  # what is in it may change
        assert not watch.is_gone()
        (run / "file").unlink()
        if how == "moved":
            run.rename(run.with_name("elsewhere"))
        else:
            run.rmdir()
        if how == "replaced":
            run.mkdir()
        assert watch.is_gone()
    with pytest.raises(RunRefused, match=r"run: this folder is gone"):
        watch.refuse_if_gone()


def test_a_folder_that_is_there_again_is_not_gone(run):
    with FolderWatch(str(run)) as watch:
        run.rename(run.with_name("elsewhere"))
        assert watch.is_gone()
        run.with_name("elsewhere").rename(run)
    watch.refuse_if_gone()


def test_it_is_told_once_a_minute(run, monkeypatch, caplog):
    looks, told = [], threading.Event()
    monkeypatch.setattr(folderwatch, "LOOK_S", 0.0)

    class Clock:
        @staticmethod
        def monotonic():  # 20 s from look to look
            looks.append(1000.0 + 20 * len(looks))
            if len(looks) > 9:
                told.set()
            return looks[-1]

    monkeypatch.setattr(folderwatch, "time", Clock)
    monkeypatch.setattr(logging.getLogger("distrain"), "propagate", True)
    watch = FolderWatch(str(run))
    run.rmdir()
    with caplog.at_level("WARNING", logger="distrain"), watch:
        assert told.wait(30)
    # a logger that other tests have set up may hand one record on twice
    lines = {id(r) for r in caplog.records if "this folder is gone" in r.getMessage()}
    assert len(lines) >= 2
    assert len(lines) <= len(looks) // 3 + 1

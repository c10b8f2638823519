"""Launchers of users: the torchrun example, and runs whose launcher has no client."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from distrain.launch.options import RankOptions
from distrain.runfolder.attempts import read_attempts
from distrain.runs.__main__ import run
from distrain.runs.records import read

ROOT = Path(__file__).parents[2]
EXAMPLE = "examples.torchrun_launcher.TorchrunLauncher"


def state(folder, capsys) -> tuple[str, str]:
    assert run([str(folder), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    return found["state"], found["why"]


def test_the_example_is_short():
    assert len((ROOT / "examples/torchrun_launcher.py").read_text().splitlines()) <= 60


@pytest.mark.ranks
def test_torchrun_trains_in_the_background_and_can_be_watched_and_stopped(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(ROOT)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ["+experiment=digits", "launch=external", f"launch._target_={EXAMPLE}"]
    command += ["+launch.ranks=2", "trainer.max_iter=100000", "trainer.window=2"]
    done = subprocess.run(
        [sys.executable, "-m", "distrain", *command], cwd=tmp_path, env=env, check=False
    )
    assert done.returncode == 0
    folder = tmp_path / "runs/digits"
    deadline = time.monotonic() + 200
    while read(folder).iteration < 4:
        assert state(folder, capsys)[0] == "running"
        assert time.monotonic() < deadline, (folder / "torchrun.log").read_text()
        time.sleep(0.3)
    assert state(folder, capsys)[1].startswith("torchrun ")
    assert run(["resume", str(folder)]) == 2
    assert "it is running" in capsys.readouterr().err
    assert run(["stop", str(folder)]) == 0
    assert ": stopped at iteration " in capsys.readouterr().out
    assert state(folder, capsys)[0] == "stopped"
    (attempt,) = read_attempts(folder)
    assert attempt.outcome == "stopped"
    assert attempt.kept_iter == attempt.last_iter >= 4
    assert run(["show", str(folder)]) == 0
    assert "attempts" in capsys.readouterr().out


CODE = """
from distrain.errors import ExitCode
from distrain.launch import Launcher


class Silent(Launcher):
    waits = False

    def start(self, job):
        return ExitCode.FINISHED


class Waiting(Launcher):
    def start(self, job):
        return job()
"""


@pytest.mark.parametrize(
    ("target", "age_s", "expected"),
    [
        ("user_launchers.Silent", 5, "running"),  # it may train: its ranks need not hold the lock
        ("user_launchers.Silent", 2000, "dead"),
        ("user_launchers.Waiting", 5, "dead"),  # it held the lock while it trained
        ("missing_launchers.Any", 5, "running"),
        ("missing_launchers.Any", 2000, "dead"),
        ("os.system", 5, "running"),
    ],
)
def test_a_run_without_a_client_is_judged_by_its_files(
    tmp_path, monkeypatch, capsys, target, age_s, expected
):
    (tmp_path / "user_launchers.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "runs/a"
    folder.mkdir(parents=True)
    conf = {"trainer": {"max_iter": 9}, "launch": {"_target_": target}}
    (folder / "run.yaml").write_text(yaml.safe_dump(conf))
    (folder / "metrics.jsonl").write_text('{"iteration": 4, "loss": 0.5}\n')
    then = time.time() - age_s
    os.utime(folder / "metrics.jsonl", (then, then))
    found, why = state(folder, capsys)
    assert found == expected
    if "Waiting" not in target:
        assert why.endswith("; its launcher reports no state")
    if found == "running":
        assert run(["stop", str(folder)]) == 2
        assert "stop it where its ranks run" in capsys.readouterr().err


def test_the_launcher_of_another_users_run_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "their_launcher.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "run.yaml").write_text("launch: {_target_: their_launcher.Launcher}\n")
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert read(tmp_path).launcher is None
    assert "their_launcher" not in sys.modules


@pytest.mark.parametrize("name", ["local", "slurm", "allocation"])
def test_defaults_in_yaml_are_those_of_the_constructor(name):
    """Hydra needs each key in a file: both state the default, and here they are compared."""
    folder = ROOT / "conf/launch"
    node = yaml.safe_load((folder / f"{name}.yaml").read_text())
    for option in ("ranks", "nodes") if name != "local" else ("ranks",):
        more = yaml.safe_load((folder / f"options/{option}.yaml").read_text())
        node = {key: value for key, value in more.items() if key != "defaults"} | node
    del node["defaults"]
    module, _, cls = node.pop("_target_").rpartition(".")
    launcher = getattr(importlib.import_module(module), cls)
    assert isinstance(launcher(), RankOptions)
    names = [entry.name for entry in dataclasses.fields(launcher)]
    assert {name: getattr(launcher(), name) for name in names} == node

"""Runs whose checkpoints are mirrored: on a new disk, with a store that fails, killed, misused."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
from checkpoint_cases import checkpoints, iterations_in
from project import write_project
from ranks import run_ranks
from resume_cases import ITERS, conf_of, differing, state_of, train
from s3_server import BUCKET, KEY_ID, SECRET, environment_of, until
from test_training import CONF, ROOT, TINY

from distrain.checkpoint.mirror import Mirror
from distrain.cli.command import Command
from distrain.errors import ConfigError, ExitCode
from distrain.job.checkpoints import RunMirror

pytestmark = pytest.mark.ranks
URL = f"s3://{BUCKET}/runs/tiny"
DOWN = environment_of("http://127.0.0.1:9")  # the port of discard


@pytest.fixture
def folder(tmp_path):
    write_project(tmp_path, module="tiny", code=TINY, experiment="tiny", conf=CONF)
    return tmp_path


def start(folder, *overrides, environment=None):
    command = [sys.executable, "-m", "distrain", "--config-dir", "conf", "+experiment=tiny"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen(
        [*command, *overrides],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def command(folder, capfd, monkeypatch):
    """Return what runs the command here, for torch is loaded already: exit code and output."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))

    def command(*overrides, url=URL, environment=None):
        mirror = [f"checkpoint.mirror={url}"] if url else []
        arguments = ["--config-dir", "conf", "+experiment=tiny", *mirror, *overrides]
        flags, rest = arguments[:2], arguments[2:]
        argv = [*flags, *[each for each in rest if each == "-m"]]
        argv += [each for each in rest if each != "-m"]
        for name, value in (environment or {}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["distrain", *argv])
        code = Command(argv).run()
        sys.modules.pop("tiny", None)
        return code, "".join(capfd.readouterr())

    return command


def lose_disk(folder):
    """Begin with a run folder that is not there any more."""
    runs = folder / "runs"
    runs.rename(folder / f"lost-{len(list(folder.glob('lost-*')))}")


def names_at(s3, place="runs/tiny/"):
    return sorted({key.removeprefix(place).split("/")[0] for key in s3.objects(place)})


def stopped_then_elsewhere(rank, folder, url):
    mirror = {"mirror": url, "mirror_wait": 200, "keep_last": 3, "keep_every": None}
    first = {**conf_of(stop={"after": 6, "crash": False}, period=None), "checkpoint": mirror}
    code, before = train(first, folder / "one")
    assert code == ExitCode.STOPPED
    code, after = train({**conf_of(period=None), "checkpoint": mirror}, folder / "two")
    assert code == ExitCode.FINISHED
    assert after, "some iterations were left"
    assert not before.keys() & after.keys(), "it went on where it had stopped"
    code, straight = train(conf_of(period=None), folder / "whole")
    assert {**before, **after} == straight
    return max(before) + 1


@pytest.mark.usefixtures("short_windows")
def test_on_a_new_disk_the_run_is_the_same_bit_for_bit(s3, tmp_path, monkeypatch):
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    stopped, _ = run_ranks(stopped_then_elsewhere, 2, tmp_path, URL, timeout_s=250)
    assert differing(state_of(tmp_path / "two"), state_of(tmp_path / "whole")) == []
    assert names_at(s3) == [f"iter_{stopped:010d}", f"iter_{ITERS:010d}"]
    assert iterations_in(tmp_path / "two" / "checkpoints") == [stopped, ITERS]


def test_the_command_with_credentials_nowhere(s3, folder, command):
    code, output = command(environment=s3.environment)
    assert code == 0, output
    assert f"checkpoints are in {URL} (" in output
    assert {"iter_0000000030", "run.yaml"} <= {*names_at(s3)}
    lose_disk(folder)
    code, more = command("trainer.max_iter=40", "resume=must", environment=s3.environment)
    assert code == 0, more
    assert f"fetched iter_0000000030 from {URL}" in more
    assert "continuing after iteration 30" in more
    shown = subprocess.run(
        [sys.executable, "-m", "distrain.runs", "show", "runs/tiny"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"{URL}: iteration 40 is there; 1 uploads, 0 skipped, 0 failures" in shown
    texts = [output, more, shown] + [s3.get(key).decode("latin1") for key in s3.objects()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    texts += [path.read_bytes().decode("latin1") for path in files]
    assert len(files) > 30
    for text in texts:
        assert SECRET not in text
        assert KEY_ID not in text
    code, output = command(url=f"s3://{KEY_ID}:{SECRET}@bucket/x")
    assert code == 2
    assert "without credentials" in output
    assert SECRET not in output
    assert SECRET.split("/")[0] not in output


def test_a_store_that_is_down_at_a_start(folder, command):
    code, output = command(environment=DOWN)
    assert code == 1, output
    assert f"checkpoint.mirror={URL} cannot be read" in output
    assert "run it again when it can be read" in output
    assert not (folder / "runs" / "tiny" / "checkpoints").exists()
    code, output = command("trainer.max_iter=10", url=None)
    assert code == 0, output
    code, output = command("checkpoint.mirror_wait=0", environment=DOWN)
    assert code == 0, output
    assert "cannot be read" in output
    assert "the run continues from local iteration 10" in output
    assert "finished: 30 of 30" in output
    assert "the same command uploads them" in output
    assert iterations_in(folder / "runs" / "tiny" / "checkpoints") == [10, 20, 30]


def test_what_is_left_is_uploaded_by_the_same_command(s3, folder, command):
    s3.fault("hold", method="PUT", path="iter_0000000030/model")
    code, output = command("checkpoint.mirror_wait=1", environment=s3.environment)
    assert code == 0, output
    assert "checkpoints are missing there" in output
    s3.clear()
    code, output = command(environment=s3.environment)
    assert code == 0, output
    assert "(1 uploads, 0 skipped, 0 failures)" in output
    assert "iter_0000000030/manifest.json" in " ".join(s3.objects())
    code, output = command(url=f"{URL}/", environment=s3.environment)
    assert code == 0, output
    assert "all 30 iterations are done" in output
    assert "checkpoints are in" not in output, "no rank is started for nothing"


def test_kill_9_in_the_middle_of_an_upload(s3, folder, command):
    code, output = command("trainer.max_iter=10", environment=s3.environment)
    assert code == 0, output
    s3.fault("hold", method="PUT", path="training")
    process = start(
        folder, f"checkpoint.mirror={URL}", "trainer.max_iter=10000000", environment=s3.environment
    )
    until(lambda: s3.num_faults() > 0)
    children = psutil.Process(process.pid).children(recursive=True)
    assert any("mirror_process" in word for child in children for word in child.cmdline())
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert not psutil.wait_procs(children, timeout=60)[1], "an orphan"
    s3.clear()
    (half,) = {*names_at(s3)} - {"iter_0000000010", "run.yaml"}
    assert f"runs/tiny/{half}/model.safetensors" in s3.objects()
    assert f"runs/tiny/{half}/manifest.json" not in s3.objects()
    lose_disk(folder)
    code, output = command(
        "trainer.max_iter=19", "hooks.checkpoint.period=7", environment=s3.environment
    )
    assert code == 0, output
    assert f"checkpoint passed over: {URL}/{half} is half an upload" in output
    assert "continuing after iteration 10" in output
    assert half not in names_at(s3)


def test_a_stop_request_ends_the_wait_for_the_mirror(s3, folder):
    s3.fault("hold", method="GET", path="^/bucket")
    process = start(folder, f"checkpoint.mirror={URL}", environment=s3.environment)
    until(lambda: s3.num_faults() > 0)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == 75, output
    assert "stopped before the first step; run it again" in output
    assert not psutil.wait_procs(children, timeout=60)[1], "an orphan"
    assert not (folder / "runs" / "tiny" / "checkpoints").exists()


def test_a_stop_request_ends_the_last_wait(s3, folder):
    s3.fault("hold", method="PUT", path="iter_0000000030/model")
    process = start(folder, f"checkpoint.mirror={URL}", environment=s3.environment)
    log = folder / "runs" / "tiny" / "logs" / "rank_0.log"
    until(lambda: log.exists() and "waiting for uploads" in log.read_text())
    process.send_signal(signal.SIGTERM)
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == 0, output
    assert "finished: 30 of 30" in output
    assert "checkpoints are missing there" in output


def test_a_place_that_cannot_be_that_of_this_run(folder, command):
    url = f"file://{folder}/place"
    code, output = command("trainer.max_iter=10", url=url)
    assert code == 0, output
    code, output = command("trainer.max_iter=10", "run.name=other", url=None)
    assert code == 0, output
    code, output = command("run.name=other", url=url)
    assert code == 2, output
    assert "holds checkpoints of another run" in output
    assert iterations_in(folder / "place") == [10]
    code, output = command("run.name=third", url=url)
    assert code == 2, output
    assert (
        f"{url}: expected an empty place, or one of the run third; it holds the run tiny" in output
    )
    assert not (folder / "runs" / "third").exists(), "nothing is left of a mistake"
    code, output = command("run.name=third", "resume=never", url=url)
    assert code == 2, output
    assert "expected an empty place for resume=never" in output
    code, output = command("run.name=third", "resume=must", url=f"file://{folder}/empty")
    assert code == 2, output
    assert "resume=must: expected a checkpoint" in output
    before = (folder / "runs" / "other" / "run.yaml").read_bytes()
    for name in ("other", "other/checkpoints", "other/mirror", "fourth"):
        code, output = command("run.name=fourth", url=f"file://{folder}/runs/{name}")
        assert code == 2, output
        assert "expected a place outside of run folders" in output
    assert (folder / "runs" / "other" / "run.yaml").read_bytes() == before
    lose_disk(folder)
    code, output = command("optim.lr=0.01", url=url)
    assert code == 2, output
    assert f"checkpoint.mirror={url}: this run has another configuration" in output
    assert "optim.lr: 0.05 -> 0.01" in output
    (folder / "place" / "run.yaml").write_text("run: [tiny]")
    code, output = command(url=url)
    assert code == 2, output
    assert "it holds the run None" in output
    assert not (folder / "runs" / "tiny").exists()


def refused(rank, folder, url):
    conf = {**conf_of(), "checkpoint": {"mirror": url}}
    with pytest.raises(ConfigError) as caught:
        train(conf, folder)
    return str(caught.value)


def test_all_ranks_refuse_together(tmp_path):
    url = f"file://{tmp_path}/place"
    checkpoints(tmp_path / "other", 10)
    mirror = Mirror(url, tmp_path / "other", keep={"last": 1, "every": None})
    try:
        assert mirror.finish(lambda: False)
    finally:
        mirror.close()
    checkpoints(tmp_path / "run" / "checkpoints", 5)
    one, two = run_ranks(refused, 2, tmp_path / "run", url)
    assert one == two
    assert f"checkpoint.mirror={url}: holds checkpoints of another run" in one


def test_damaged_ones_only_are_not_a_new_run(folder, command):
    place = folder / "place"
    code, output = command("trainer.max_iter=10", url=f"file://{place}")
    assert code == 0, output
    (place / "iter_0000000010" / "state.json").write_text("{}")
    lose_disk(folder)
    code, output = command(url=f"file://{place}")
    assert code == 1, output
    assert "none of 1 checkpoints is valid" in output


def test_the_runs_of_a_sweep_have_places_of_their_own(folder, command):
    url = f"file://{folder}/place"
    code, output = command("-m", "optim.lr=0.1,0.2", "trainer.max_iter=10", url=url)
    assert code == 0, output
    places = ["optim.lr=0.1", "optim.lr=0.2"]
    assert sorted(os.listdir(folder / "place")) == places
    assert all(iterations_in(folder / "place" / name) == [10] for name in places)
    again = subprocess.run(
        [sys.executable, "-m", "distrain.runs", "resume", "runs/tiny/optim.lr=0.1"]
        + ["trainer.max_iter=20"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert again.returncode == 0, again.stderr
    assert iterations_in(folder / "place" / "optim.lr=0.1") == [10, 20]
    assert sorted(os.listdir(folder / "place")) == places


def test_a_run_without_checkpoints_needs_no_store(tmp_path):
    """The control of `finish`: it returns although no checkpoint was ever saved."""
    mirror = Mirror(f"file://{tmp_path}/x", tmp_path / "none", keep={"last": 1, "every": None})
    try:
        assert mirror.finish(lambda: False)
    finally:
        mirror.close()
    assert not (tmp_path / "x").exists()
    assert checkpoints(Path(tmp_path)).newest_valid() is None


@pytest.mark.parametrize("outcome", [ExitCode.STOPPED, ExitCode.FINISHED])
def test_the_last_save_counts_for_the_time_after_a_stop_request(tmp_path, monkeypatch, outcome):
    """The ranks are killed `launch.grace_s` after the request, however long the save took."""
    monkeypatch.setattr("distrain.checkpoint.mirror.MirrorProcess", mock.Mock(side_effect=OSError))
    settings = {"mirror": f"file://{tmp_path}/x", "mirror_wait": 300, "keep_last": 1}
    conf = {"checkpoint": {**settings, "keep_every": None}, "launch": {"grace_s": 40}}
    with RunMirror(conf, str(tmp_path)) as mirror:
        mirror._stop.since = time.monotonic() - 19.5
        mirror.start()
        started = time.monotonic()
        mirror.finish(outcome)
        assert time.monotonic() - started < 10

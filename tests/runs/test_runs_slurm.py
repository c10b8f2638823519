"""Runs on SLURM told from recorded files and from what squeue says; and what stop and resume do."""

import dataclasses
import fcntl
import json
import os
import time
from pathlib import Path

import pytest

from distrain.errors import ConfigError, ExitCode
from distrain.launch.slurm.attempts import (
    NodeRecord,
    is_stop_requested,
    request_stop,
)
from distrain.launch.slurm.batch import begin, end
from distrain.runfolder.attempts import Attempt, read_attempts
from distrain.runs.__main__ import run
from distrain.runs.control import command
from distrain.runs.records import Start

CONF = """
trainer: {max_iter: 100}
launch: {_target_: distrain.launch.slurm.launcher.SlurmLauncher, nodes: 2, ranks: 4}
"""
FIRST = Attempt(1, "12", 0, ["n1", "n2"], start=1000.0, end=1100.0, kept_iter=60, step_s=1.0)
STOPPED = dataclasses.replace(FIRST, outcome="stopped", why="SIGTERM on n1")
SECOND = Attempt(2, "12", 1, ["n1"], start=1150.0, first_iter=60)


def record(
    folder: Path, *attempts: Attempt, running: Attempt | None = None, job_id: str | None = "12"
) -> Path:
    """Write what a run on SLURM leaves behind."""
    (folder / "slurm").mkdir(parents=True)
    (folder / "run.yaml").write_text(CONF)
    (folder / "slurm/submitted.json").write_text(json.dumps({"job_id": job_id, "from": "login"}))
    lines = [json.dumps(dataclasses.asdict(attempt)) + "\n" for attempt in attempts]
    (folder / "attempts.jsonl").write_text("".join(lines))
    if running is not None:
        (folder / "slurm/running.json").write_text(json.dumps(dataclasses.asdict(running)))
    return folder


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Return a function that sets what a command of SLURM answers; each notes its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("squeue", "scancel"):
        text = f'#!/bin/sh\necho "{name} $*" >> "{folder}/calls"\n. "{folder}/{name}.answer"\n'
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    def answers(name: str, said: str, code: int = 0) -> Path:
        stream = "" if code == 0 else " >&2"
        lines = "".join(f"echo '{line}'{stream}\n" for line in said.splitlines())
        (folder / f"{name}.answer").write_text(f"{lines}exit {code}\n")
        return folder / "calls"

    answers("squeue", "")
    answers("scancel", "")
    return answers


def the_run(folder: Path, capsys) -> dict:
    assert run([str(folder), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    return found


CASES = [
    # attempts, running, squeue, state, why
    ((), None, "12 PENDING", "queued", "job 12"),
    ((), FIRST, "12 RUNNING", "running", "job 12: RUNNING"),
    ((), None, "12 CONFIGURING", "running", "job 12: CONFIGURING"),
    ((STOPPED,), None, "12 PENDING", "preempted", "job 12: SIGTERM on n1"),
    ((), FIRST, "12 PENDING", "preempted", "job 12: lost"),
    ((STOPPED,), SECOND, "12 RUNNING", "running", "job 12: RUNNING"),
    ((STOPPED,), None, "", "stopped", "SIGTERM on n1"),
    ((STOPPED,), None, "12 CANCELLED", "stopped", "SIGTERM on n1"),
    ((), None, "", "stopped", "job 12 left the queue before it started"),
    ((), FIRST, "", "dead", "job 12 has ended; attempt 1 recorded no end"),
    ((STOPPED,), SECOND, "12 TIMEOUT", "dead", "job 12 has ended; attempt 2 recorded no end"),
    (
        (dataclasses.replace(FIRST, outcome="lost", why="no record from n2"),),
        *(None, "", "dead", "no record from n2"),
    ),
    (
        (dataclasses.replace(FIRST, outcome="failed", why="rank 3 failed: x\nTraceback"),),
        *(None, "12 COMPLETING", "failed", "rank 3 failed: x"),
    ),
    ((dataclasses.replace(FIRST, outcome="finished", why="done"),), None, "", "finished", "done"),
]


@pytest.mark.parametrize(("attempts", "running", "said", "state", "why"), CASES)
def test_states(slurm, tmp_path, capsys, attempts, running, said, state, why):
    slurm("squeue", said)
    record(tmp_path / "runs/a", *attempts, running=running)
    found = the_run(tmp_path / "runs", capsys)
    assert (found["state"], found["why"]) == (state, why)
    assert found["job_id"] == "12"
    nodes = len(running.nodes) if running else 2
    assert found["ranks"] == 4 * nodes


def test_slurm_is_asked_once_and_only_about_jobs_that_may_be_at_work(slurm, tmp_path, capsys):
    calls = slurm("squeue", "13_1 PENDING\n12 RUNNING")
    record(tmp_path / "runs/a", running=FIRST)
    record(tmp_path / "runs/s/b", job_id="13_1")
    record(
        tmp_path / "runs/s/c",
        dataclasses.replace(FIRST, outcome="finished", job_id="9"),
        job_id="9",
    )
    assert run([str(tmp_path / "runs"), "--json"]) == 0
    states = {each["name"]: each["state"] for each in json.loads(capsys.readouterr().out)}
    assert states == {"a": "running", "s/b": "queued", "s/c": "finished"}
    expected = "squeue --noheader --array --states=all --format=%i %T --jobs=12,13_1"
    assert calls.read_text().splitlines() == [expected]


def test_a_job_that_ends_while_slurm_is_asked_is_not_called_dead(slurm, tmp_path, capsys):
    folder = record(tmp_path / "runs/a", running=FIRST)
    ended = record(tmp_path / "ended", STOPPED) / "attempts.jsonl"
    calls = slurm("squeue", "")
    (tmp_path / "row").write_text('{"iteration": 59, "loss": 1.0}\n')
    (tmp_path / "bin/squeue.answer").write_text(
        f"cp {ended} {folder}; cp {tmp_path}/row {folder}/metrics.jsonl\n"
        f"rm -f {folder}/slurm/running.json\n"
    )
    found = the_run(tmp_path / "runs", capsys)
    assert (found["state"], found["why"]) == ("stopped", "SIGTERM on n1")
    assert found["iteration"] == 60
    assert len(calls.read_text().splitlines()) == 2


def test_a_controller_that_is_down_is_told_and_the_files_go_on_talking(slurm, tmp_path, capsys):
    slurm("squeue", "slurm_load_jobs error: Unable to contact slurm controller", code=1)
    record(tmp_path / "runs/a", running=FIRST)
    assert run([str(tmp_path / "runs"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)[0]["state"] == "running"
    assert json.loads(out)[0]["why"] == "job 12 (by its files): RUNNING"
    assert err == (
        "distrain.runs: SLURM does not answer: "
        "slurm_load_jobs error: Unable to contact slurm controller\n"
    )


def test_a_job_that_slurm_has_forgotten(slurm, tmp_path, capsys):
    slurm("squeue", "slurm_load_jobs error: Invalid job id specified", code=1)
    record(tmp_path / "runs/a", STOPPED)
    assert the_run(tmp_path / "runs", capsys)["state"] == "stopped"


def test_goodput_counts_the_queue(slurm, tmp_path, capsys):
    """60 and 30 iterations of 1 s count, of 200 s since the first start: 45 %."""
    finished = dataclasses.replace(SECOND, end=1200.0, kept_iter=90, step_s=1.0, outcome="failed")
    folder = record(tmp_path / "runs/a", STOPPED, finished)
    (folder / "metrics.jsonl").write_text('{"iteration": 89, "perf/step_s": 1.0, "loss": "NaN"}\n')
    found = the_run(tmp_path / "runs", capsys)
    assert found["goodput"] == pytest.approx(0.45)
    assert found["values"] == {"perf/step_s": 1.0, "loss": "NaN"}
    assert found["iteration"] == 90


DAMAGED = {
    "run.yaml": [
        "][",
        "a",
        "trainer: 5\nlaunch: x\n",
        CONF.replace("100", "abc").replace("4", "x"),
    ],
    "command.json": ["[", "[]", '{"starts": 5}', '{"starts": [5, {"end": 3, "argv": null}]}'],
    "metrics.jsonl": ["\0\0\n5\n{}\n", '{"iteration": "x"}\n{"iteration": 3, "loss": [1]}\n'],
    "attempts.jsonl": ["{", "5\n", '{"a": 1}\n'],
    "slurm/running.json": ["[]", '{"attempt": 3}'],
    "slurm/submitted.json": ["", "{}", '{"job_id": null}'],
    "lock": ["", "x", "[]", '{"pid": "x"}'],
}


@pytest.mark.parametrize(("name", "text"), [(n, text) for n in DAMAGED for text in DAMAGED[n]])
def test_files_that_are_damaged_are_passed_over(slurm, tmp_path, capsys, name, text):
    folder = record(tmp_path / "runs/a", STOPPED)
    (folder / "metrics.jsonl").write_text('{"iteration": 4, "perf/step_s": 0.1, "loss": 1.0}\n')
    (folder / name).write_text(text)
    found = the_run(tmp_path / "runs", capsys)
    assert found["iteration"] in (0, 5)
    assert run([str(tmp_path / "runs")]) == 0
    assert run(["show", str(folder)]) == 0
    assert run(["diff", str(folder), str(folder)]) == 0
    assert capsys.readouterr().err == ""


# stop


def test_stop_takes_a_waiting_job_out_of_the_queue(slurm, tmp_path, capsys):
    calls = slurm("squeue", "12 PENDING")
    folder = record(tmp_path / "a")
    assert run(["stop", str(folder), "--no-wait"]) == 0
    assert capsys.readouterr().out == f"{folder}: asked to save and stop\n"
    assert calls.read_text().splitlines()[1:] == ["scancel 12"]
    assert not is_stop_requested(folder, "12")


def test_stop_signals_the_nodes_of_a_running_job_and_leaves_word(slurm, tmp_path, capsys):
    calls = slurm("squeue", "12 RUNNING")
    folder = record(tmp_path / "a", running=FIRST)
    assert run(["stop", str(folder), "--no-wait"]) == 0
    assert calls.read_text().splitlines()[1:] == ["scancel --signal=USR2 12"]
    assert is_stop_requested(folder, "12")
    assert not is_stop_requested(folder, "13")
    assert not is_stop_requested(folder, None)


def test_stop_says_why_slurm_does_not_do_it(slurm, tmp_path, capsys):
    slurm("squeue", "12 RUNNING")
    slurm("scancel", "scancel: error: Kill job error on job id 12: Access denied", code=1)
    folder = record(tmp_path / "a", running=FIRST)
    assert run(["stop", str(folder)]) == 2
    assert capsys.readouterr().err == (
        f"distrain.runs: {folder}: job 12 cannot be stopped: "
        "scancel: error: Kill job error on job id 12: Access denied\n"
    )


def test_resume_refuses_a_job_that_waits(slurm, tmp_path, capsys):
    slurm("squeue", "12 PENDING")
    folder = record(tmp_path / "a", STOPPED)
    assert run(["resume", str(folder)]) == 2
    assert f"{folder}: it is preempted (job 12: SIGTERM on n1)" in capsys.readouterr().err


def test_the_batch_script_does_not_requeue_what_was_asked_to_stop(tmp_path, monkeypatch, capfd):
    """The same attempt without that word would be requeued."""
    for name, value in {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/calls\necho "JobId=12 JobState=RUNNING Reason=None"\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    requeued = []
    for asked in (True, False):
        folder = record(tmp_path / f"asked-{asked}")
        assert begin(folder, max_requeues=3) == ExitCode.FINISHED
        NodeRecord("n1", code=ExitCode.STOPPED, signals=["SIGUSR2"]).write(folder)
        if asked:
            request_stop(folder, "12")
        assert end(folder, step_exit=0, max_requeues=3) == ExitCode.STOPPED
        assert read_attempts(folder)[0].requeued == (not asked)
        requeued.append((tmp_path / "calls").read_text().count("requeue 12"))
        assert not is_stop_requested(folder, "12")
    assert requeued == [0, 1]


def test_an_attempt_that_was_asked_to_stop_before_it_began_does_not_begin(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    folder = record(tmp_path / "a", STOPPED)
    request_stop(folder, "12")
    assert begin(folder, max_requeues=3) == ExitCode.STOPPED
    assert not (folder / "slurm/running.json").exists()
    assert not is_stop_requested(folder, "12")  # whoever requeues it by hand wants it to run


# resume


def test_the_command_of_a_run_in_a_sweep():
    argv = ["-m", "--config-dir", "conf", "+experiment=x", "a.b=1,2", "+c=5", "hydra.verbose=true"]
    argv += ["hydra.sweeper.max_jobs=2", "--config-name=main", "resume=never"]
    overrides = ["+experiment=x", "a.b=2", "+c=5", "resume=never", "run.dir=old"]
    start = Start(argv, overrides, "/", "", 0.0, None, None, "", {}, {})
    assert command(start, [], run_dir=Path("/r/it's")) == [
        *("--config-dir", "conf", "--config-name=main", "hydra.verbose=true"),
        *("+experiment=x", "a.b=2", "+c=5", "run.dir='/r/it\\'s'"),
    ]
    assert command(start, ["a.b=3", "c=6", "~d", "launch=slurm"], run_dir=Path("/r"))[4:] == [
        *("+experiment=x", "a.b=3", "+c=6", "~d", "launch=slurm", "run.dir='/r'"),
    ]
    unknown = dataclasses.replace(start, overrides=None)
    with pytest.raises(ConfigError, match="does not hold its overrides; give the command again"):
        command(unknown, [], run_dir=Path("/r"))


def test_a_stop_elsewhere_names_the_machine(tmp_path, capsys):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "run.yaml").write_text("trainer: {max_iter: 5}\n")
    with (folder / "lock").open("w") as lock:
        lock.write(json.dumps({"pid": 77, "host": "far", "since": time.ctime()}))
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run(["stop", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err == f"distrain.runs: {folder}: it runs on far; stop it there: kill -TERM 77\n"
    assert os.path.exists(folder / "lock")

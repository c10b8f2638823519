"""Starts of many nodes and ranks: files per look, and the limit on open files."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import FORK

from distrain.errors import ConfigError
from distrain.launch import rendezvous
from distrain.launch.slurm import attempts as slurm_attempts
from distrain.launch.slurm import task as slurm_task
from distrain.launch.slurm.attempts import NodeRecord
from distrain.launch.slurm.task import NodeTask
from distrain.launch.stop import StopRequest
from distrain.process import open_files as openfiles

NODES = 64


def test_a_look_at_the_nodes_opens_no_record(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (tmp_path / "slurm").mkdir()
    names = [f"n{number}" for number in range(NODES)]
    NodeRecord(names[0]).write(tmp_path)
    reads, looks, pauses = [], [], []
    read, listdir = slurm_attempts.read_json, os.listdir
    monkeypatch.setattr(slurm_attempts, "read_json", lambda path: reads.append(path) or read(path))
    monkeypatch.setattr(os, "listdir", lambda path: looks.append(path) or listdir(path))

    def sleep(seconds):
        """Seven more nodes come in each pause, 63 in nine."""
        pauses.append(seconds)
        for name in names[7 * len(pauses) - 6 : 7 * len(pauses) + 1]:
            NodeRecord(name).write(tmp_path)

    monkeypatch.setattr(slurm_task.time, "sleep", sleep)
    NodeTask(job=None, run_dir=tmp_path, ranks=1)._await_nodes(names, StopRequest())
    assert len(reads) == 0  # it was one per name and record, 64 x 64 in the last look
    assert len(pauses) == 9
    assert len(looks) == 10
    assert pauses == sorted(pauses)
    assert pauses[0] == 0.1
    assert pauses[-1] == 2.0


def test_a_wait_for_the_other_nodes_asks_less_and_less_often(monkeypatch):
    now_s, calls = 0.0, []

    def sleep(seconds):
        nonlocal now_s
        now_s += seconds

    clock = SimpleNamespace(monotonic=lambda: now_s, sleep=sleep)
    monkeypatch.setattr(rendezvous, "time", clock)
    assert not rendezvous._wait(lambda: calls.append(now_s), 60.0)
    assert len(calls) < 140  # it was 1,200, from each of up to 512 nodes
    assert calls[1] <= 0.05
    assert 60.0 - calls[-2] <= 0.5


def limited(soft, hard, fn, *args):
    """Return what a function does in a process with a limit on open files."""

    def main():
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        try:
            answers.put(fn(*args) or resource.getrlimit(resource.RLIMIT_NOFILE))
        except ConfigError as error:
            answers.put(str(error))

    answers = FORK.SimpleQueue()
    process = FORK.Process(target=main)
    process.start()
    try:
        return answers.get()
    finally:
        process.join()


def test_the_soft_limit_on_open_files_becomes_the_hard_one():
    assert limited(200, 300, openfiles.raise_limit) == (300, 300)


@pytest.mark.parametrize("ranks", [20, 200])
def test_a_mesh_that_does_not_fit_names_the_limit_and_the_ranks(ranks):
    limit = 200 + len(os.listdir("/proc/self/fd"))  # what the tests themselves have open
    said = limited(limit, limit, openfiles.check_mesh, ranks)
    if ranks == 20:  # 38 sockets
        assert said == (limit, limit)
    else:  # 398
        assert said.startswith(f"ulimit -n {limit}: expected at least ")
        assert "for 200 ranks (2 sockets per rank to each other one)" in said


@pytest.mark.ranks
def test_a_start_that_does_not_fit_is_refused_before_any_rank_starts(tmp_path):
    argv = [sys.executable, "-m", "distrain", "+experiment=digits", "launch.ranks=8"]
    done = subprocess.run(
        [*argv, "trainer.max_iter=1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stderr.splitlines()
    assert lines[0] == "distrain: starting 8 ranks"
    assert lines[1].startswith("distrain: ulimit -n 40: expected at least ")
    assert " for 8 ranks (the agent opens up to 8 files and pipes of each)" in lines[1]
    assert len(lines) == 2
    assert done.returncode == 2

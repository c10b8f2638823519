"""Starts of many nodes and ranks: files per look, and the limit on open files."""

import os
import resource

import pytest
from ranks import FORK

from distrain import openfiles
from distrain.errors import ConfigError
from distrain.launch import slurm_attempts, slurm_task
from distrain.launch.slurm_attempts import NodeRecord
from distrain.launch.slurm_task import NodeTask
from distrain.launch.stop import StopRequest

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
    said = limited(200, 200, openfiles.check_mesh, ranks)
    if ranks == 20:  # 38 sockets
        assert said == (200, 200)
    else:  # 398
        assert said.startswith("ulimit -n 200: expected at least ")
        assert "for 200 ranks (2 sockets per rank to each other one)" in said

"""launch=external: processes that another program starts take one run folder, or none hangs."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import FORK

from distrain.errors import ConfigError, RankFailed
from distrain.launch.external import ExternalLauncher, rank_env
from distrain.launch.local import refuse_among_ranks
from distrain.launch.run_dir_handover import Handover
from distrain.process.environment import env_int, restart_count

ROOT = Path(__file__).parents[2]
NOW = 'run.name="now-${now:%f}"'


def rank_environment(rank, port, num=2):
    return {
        **{"RANK": str(rank), "WORLD_SIZE": str(num), "LOCAL_RANK": str(rank)},
        **{"LOCAL_WORLD_SIZE": str(num), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(rank, port, cwd, *overrides):
    env = {**os.environ, "PYTHONPATH": str(ROOT), **rank_environment(rank, port)}
    settings = ["+experiment=digits", "launch=external", "trainer.max_iter=2", *overrides]
    return subprocess.Popen(
        [sys.executable, "-m", "distrain", *settings],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.ranks
def test_a_time_in_the_name_of_a_run_is_that_of_rank_0(tmp_path):
    port = free_port()
    ranks = [start(rank, port, tmp_path, NOW) for rank in range(2)]
    try:
        said = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], said
    (run,) = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["rank_0.log", "rank_1.log"]
    # a run that is done, and one that rank 0 refuses: the other rank ends with rank 0's code
    for override, code in (("resume=auto", 0), ("resume=never", 2)):
        port = free_port()
        ranks = [start(rank, port, tmp_path, f"run.name={run.name}", override) for rank in (0, 1)]
        said = [rank.communicate(timeout=200)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [code, code], said
        assert said[1] == ""


def test_a_message_reaches_the_other_ranks_and_a_second_is_dropped():
    port, answers = free_port(), FORK.SimpleQueue()

    def receive(rank):
        answers.put(Handover(rank_environment(rank, port, 3), timeout_s=30).receive())

    others = [FORK.Process(target=receive, args=(rank,)) for rank in (1, 2)]
    for process in others:
        process.start()
    rank_0 = Handover(rank_environment(0, port, 3), timeout_s=30)
    rank_0.send({"name": "a", "dir": "runs/a"}, is_last=True)
    rank_0.send({"code": 1})
    assert [answers.get() for _ in others] == [{"name": "a", "dir": "runs/a"}] * 2
    for process in others:
        process.join()


def test_without_rank_0_a_rank_says_where_it_waited():
    port = free_port()
    lonely = Handover(rank_environment(1, port), timeout_s=0.2)
    with pytest.raises(RankFailed, match=f"MASTER_PORT={port}: rank 0 and rank 1 do not meet"):
        lonely.receive()


def test_one_rank_opens_no_store(monkeypatch):
    monkeypatch.setattr(Handover, "_connect", None)  # calling it would fail
    Handover(rank_environment(0, 1, 1)).send({"code": 0}, is_last=True)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("RANK", "2", "from 0 to 1"),
        ("RANK", "first", "from 0 to 1"),
        ("WORLD_SIZE", "0", ">= 1"),
        ("LOCAL_RANK", "-1", ">= 0"),
        ("MASTER_PORT", "$PORT", "from 1 to 65535"),
    ],
)
def test_a_variable_that_is_no_number_of_a_rank_is_one_line(name, value, expected):
    env = {**rank_environment(1, 29500), name: value}
    with pytest.raises(
        ConfigError, match=re.escape(f"{name}={value}: expected an integer {expected}")
    ):
        rank_env(env)


def test_a_container_that_names_a_world_of_one(monkeypatch):
    found = rank_env({"RANK": "0", "WORLD_SIZE": "1"})
    del found["MASTER_PORT"]
    assert found == {
        **{"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        "MASTER_ADDR": "127.0.0.1",
    }
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_among_ranks()
    assert ExternalLauncher().owns_run


def test_counts_in_the_environment_may_be_empty(monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert restart_count() == 2
    assert ExternalLauncher().is_restart
    monkeypatch.setenv("SLURM_RESTART_COUNT", "x")
    with pytest.raises(ConfigError, match="SLURM_RESTART_COUNT=x: expected an integer"):
        restart_count()
    assert env_int("DISTRAIN_NO_SUCH", 7) == 7

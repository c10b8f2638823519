"""`python -m distrain.tune ... launch=slurm`: the runs of a rung are one job array."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dev_cluster import Cluster, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

TUNE = ("--metric", "eval/accuracy", "--rungs", "4,8", "--keep", "0.5")
RUNS = ("+experiment=digits", "hooks.eval.period=4")
JOBS = ("launch=slurm", "launch.ranks=1")
WORDS = [sys.executable, "-m", "distrain.tune", *TUNE, *RUNS, *JOBS]
GOOD, BAD = "optim.lr=0.1,0.0001", "optim.lr=0.1,0.0001,nan"


def jobs_of(user: int) -> list[str]:
    words = ["squeue", "--noheader", "--array", "--format=%i", "--user", str(user)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()


def test_a_killed_command_continues_beside_its_jobs(cluster: Cluster, tmp_path: Path) -> None:
    folder = ("--folder", str(tmp_path))
    killed = subprocess.Popen([*WORDS, *folder, BAD], stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len(jobs_of(os.getuid())) == 2, timeout_s=60)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()

    done = subprocess.run([*WORDS, *folder, BAD], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "1 of 3 runs could not start; none is promoted" in done.stderr
    table = [line.split(maxsplit=2) for line in done.stdout.splitlines()[-3:]]
    assert [row[1] for row in table] == ["4", "4", "0"]
    assert table[2][0] == "optim.lr=nan"
    assert table[2][2].strip() == "not started"
    assert "optim.lr=nan: expected a number" in (tmp_path / "jobs.log").read_text()

    words = [*WORDS, *folder, GOOD]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()[-2:]] == ["8", "4"]
    jobs = sorted((path.parts[-3], path.name) for path in tmp_path.glob("*/slurm/*_0_log.out"))
    names, logs = zip(*jobs, strict=True)
    assert names == ("optim.lr=0.0001", "optim.lr=0.1", "optim.lr=0.1")  # no job trained twice
    arrays = [log.partition("_")[0] for log in logs if log.count("_") == 3]  # 1_0_0_log.out
    assert len(arrays) == 2, logs  # the runs of the first rung
    assert len(set(arrays)) == 1, logs
    for path in tmp_path.glob("*/slurm/*_0_log.out"):
        assert "of 8 iterations" in path.read_text(), path  # of an array's element, too


def test_a_stop_ends_the_jobs_with_their_state_saved(cluster: Cluster, tmp_path: Path) -> None:
    long = (
        *WORDS,
        GOOD,
        "--folder",
        str(tmp_path),
        "--rungs",
        "100000,200000",
        "hooks.eval.period=99999",
    )
    stopped = subprocess.Popen(long, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: len([*tmp_path.glob("*/metrics.jsonl")]) == 2, timeout_s=100)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=60)
    assert stopped.returncode == 75
    wait_for(lambda: not jobs_of(os.getuid()), timeout_s=60)
    # one that began long before the other has a periodic checkpoint, too
    saved = {path.parts[-3] for path in tmp_path.glob("*/checkpoints/iter_*")}
    assert saved == {"optim.lr=0.1", "optim.lr=0.0001"}

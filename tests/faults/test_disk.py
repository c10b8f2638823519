"""A disk that is full or read-only, and no handle left: training goes on, and no line is lost."""

import json
import logging
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

WRITERS = """
import logging, os, resource, subprocess, sys, time
from pathlib import Path
from distrain.writers.background import BackgroundWriter
from distrain.writers.base import Row, RunInfo
from distrain.writers.defaults import default_writers
# while there are handles
import distrain.writers.console, distrain.writers.json_lines, distrain.writers.tensorboard

folder, fault, start = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
ballast = folder.parent / "ballast"
logging.basicConfig(level="INFO", format="%(levelname)s %(message)s")


def spoil():
    if fault == "handles":
        num = len(os.listdir("/proc/self/fd")) - 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (num, limits[1]))
    elif fault == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(folder.parent)], check=True)
    else:
        with open(ballast, "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass


def mend():
    if fault == "handles":
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    elif fault == "read-only":
        subprocess.run(["mount", "-o", "remount,rw", str(folder.parent)], check=True)
    else:
        ballast.unlink()


spoil()
writer = BackgroundWriter(default_writers(), RunInfo(folder, start))
for iteration in range(start, start + 30):
    if iteration == start + 20:
        while writer._files._items.qsize():
            time.sleep(0.01)
        time.sleep(0.2)
        mend()
    writer.write(Row(iteration, 60, {f"loss{k}": (iteration / 4, iteration) for k in range(9)}))
writer.close()
"""


@pytest.fixture
def small_disk(tmp_path):
    """Mount 8 MB of memory; who may not mount has no such disk."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small disk needs the right to mount one")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-c", *map(str, arguments)], capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("fault", ["handles", "read-only", "full"])
def test_what_cannot_be_opened_waits_until_it_can(small_disk, fault):
    """At the start of a run, and at that of its resumption."""
    run_dir = small_disk / "run"
    for start in (0, 20):  # the rows 20 to 29 of the first attempt are replaced
        said = run(WRITERS, run_dir, fault, start).stderr.splitlines()
        for name in ("TensorBoardWriter", "JsonLinesWriter"):
            told = [line for line in said if name in line]
            assert [line.split()[0] for line in told] == ["WARNING", "INFO"], said
            assert "training goes on without" in told[0]
            assert told[1] == f"INFO {name} works again"
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(50))
    assert [line["loss8"] for line in lines] == [at / 4 for at in range(50)]
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge
    events = EventAccumulator(str(run_dir)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss8")] == [
        (at, at / 4) for at in range(50)
    ]
    names = sorted({p.name.split(".")[0] for p in run_dir.iterdir()})
    assert names == ["events", "metrics"]


LOGS = """
import os, resource, sys
from pathlib import Path
from distrain import log
from distrain.launch.rank import open_log

run_dir, rank = Path(sys.argv[1]), int(sys.argv[2])
if rank:
    open_log(run_dir / "logs", rank)
log.set_up(f'{run_dir}/logs', rank=rank)
limits = resource.getrlimit(resource.RLIMIT_FSIZE)


def say(number):
    if rank:
        print(f"line {number} " + "x" * 80)
    log.logger.info("record %d %s", number, "y" * 80)


for number in range(100):
    if number == 20:
        size = os.path.getsize(run_dir / "logs" / f"rank_{rank}.log")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, limits[1]))
    if number == 70:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    say(number)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_log_that_cannot_grow_ends_nothing_and_goes_on(tmp_path, rank):
    console = run(LOGS, tmp_path, rank).stderr.splitlines()
    lines = (tmp_path / "logs" / f"rank_{rank}.log").read_text().splitlines()
    for kind, fill in (("line", "x"), ("record", "y"))[1 - rank :]:
        whole = [line for line in lines if kind in line and line.endswith(fill * 80)]
        numbers = [int(line.split(kind)[1].split()[0]) for line in whole]
        assert numbers[:20] == list(range(20))
        assert numbers[-30:] == list(range(70, 100))
        assert numbers == sorted(set(numbers))
        assert len(numbers) < 100  # a buffer of Python's holds some of those between
    halves = [line for line in lines if not line.endswith(("x" * 80, "y" * 80))]
    assert len(halves) <= 1, halves  # where the disk was full, and on a line of its own
    told = [line for line in console if "training goes on" in line]
    assert len(told) == (1 if rank == 0 else 0)
    assert not any("Traceback" in line for line in console)


def test_python_alone_would_fail(tmp_path):
    """The negative control: a plain stream raises out of print, and logs a traceback a record."""
    code = LOGS.replace("open_log(run_dir", "open_plain(run_dir").replace(
        "log.set_up(f'{run_dir}/logs', rank=rank)",
        "import logging; log.logger.addHandler(logging.FileHandler(sys.argv[1] + '/plain'))",
    )
    plain = """
def open_plain(folder, rank):
    folder.mkdir()
    sys.stdout = open(folder / f"rank_{rank}.log", "w", buffering=1)
"""
    code = code.replace("run_dir, rank =", plain + "\nrun_dir, rank =", 1)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "in say" in done.stderr
    assert "OSError: [Errno 27] File too large" in done.stderr

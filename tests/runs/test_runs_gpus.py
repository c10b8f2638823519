"""python -m distrain.runs gpus; and whole commands that share a GPU of a stand-in driver."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from project import write_project
from stand_in import LIBRARY

from distrain.gpus.claim import Claim
from distrain.runs.gpus import Device, as_text

ROOT = Path(__file__).parents[2]
PAUSE = """
import os, time
from pathlib import Path
from distrain import HookBase

class Pause(HookBase):
    def before_step(self):
        name = os.environ.get("PAUSED_UNTIL")
        while name and self.trainer.iter == 5 and not Path(name).exists():
            time.sleep(0.05)
"""
CONF = """
# @package _global_
defaults: [/experiment/digits, _self_]
hooks: {pause: {_target_: pause.Pause}}
trainer: {max_iter: 100}
"""
ALICE = Claim(
    "/home/alice/a-project/runs/digits-of-a-long-name", "alice", 41234, 100.0, gpus=("a",)
)
BOB = Claim("/home/bob/runs/b", "bob", 4, 3500.0, True, 2, ("a", "c"))


def device(gpu, uuid, *, holder=None, others=None, use=""):
    name = "NVIDIA H200"
    return Device(gpu, uuid, name, 120_000.0, 143_771.0, 97.0, holder, others or {}, use)


DEVICES = [
    device("0", "a", holder=ALICE, others={77: 2048.0}),
    device("1", "b", use="used by process 999999999", others={999999999: None}),
    device("2 MIG-c7384736", "c"),
    device("3", "d", use="memory in use by an unknown process"),
]


def test_the_table_has_a_row_per_gpu_and_per_process_without_a_lease():
    lines = as_text(DEVICES, [BOB], None, now_s=3600.0).splitlines()
    rows = [line.split() for line in lines]
    assert rows[0] == ["gpu", "name", "memory", "busy", "state", "user", "process", "since", "run"]
    assert " ".join(rows[1]) == (
        f"0 NVIDIA H200 117/140 GiB 97% held alice 41234 58 min ago {ALICE.run}"
    )
    assert rows[2][:4] == ["2", "GiB", "no", "lease"]
    assert "77" in rows[2]
    assert rows[3][-3:] == ["97%", "in", "use"]
    assert rows[4] == ["no", "lease", "999999999"]
    assert rows[5][-1] == "idle"
    assert lines[6].endswith("memory in use by an unknown process")
    assert rows[7:9] == [[], ["waiting"]]
    assert rows[10] == [
        "1",
        "2",
        "of",
        "0,2",
        "MIG-c7384736",
        "nice",
        "bob",
        "4",
        "100",
        "s",
        "ago",
        "/home/bob/runs/b",
    ]


def test_a_waiting_run_that_is_stopped_is_shown_as_silent():
    stopped = dataclasses.replace(BOB, looked_s=0.001)
    assert " silent " in as_text(DEVICES, [stopped], None, now_s=3600.0).splitlines()[-1]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_the_table_fits_into_a_narrow_terminal(width):
    text = as_text(DEVICES, [BOB], width, now_s=3600.0)
    assert max(map(len, text.splitlines())) <= width
    rows = text.splitlines()
    for words in (["0", "held", "alice", "name"], ["idle"], ["nice", "bob"], ["in use"]):
        assert any(all(word in row for word in words) for row in rows), (words, text)


def test_control_characters_of_another_user_do_not_reach_the_terminal():
    holder = Claim(run="\x1b[31m", user="a\nb", gpus=("a",))
    assert "\x1b" not in as_text([device("0", "a", holder=holder)], [holder], 80, now_s=0.0)


@pytest.fixture
def shared(tmp_path, libraries):
    """A project, and the environment of a machine with one GPU."""
    write_project(tmp_path, module="pause", code=PAUSE, experiment="pause", conf=CONF)
    says = ["gpus 1", "0.uuid GPU-0", "0.name Card", "0.utilization 5", "0.memory_busy 1"]
    says += [f"0.memory_total {80 * 2**30}", f"0.memory_used {2**28}"]
    (tmp_path / "says").write_text("\n".join(says) + "\n")
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "LD_LIBRARY_PATH": str((libraries / "new" / LIBRARY).parent),
        "NVML_STAND_IN": str(tmp_path / "says"),
        "DISTRAIN_LEASES": str(tmp_path / "leases"),
        "CUDA_VISIBLE_DEVICES": "GPU-0",  # nothing for CUDA, wherever this runs
    }
    processes = []

    def start(name, *arguments, **variables):
        console = tmp_path / f"{name}.txt"
        command = [sys.executable, "-m", "distrain", "--config-dir", "conf", "+experiment=pause"]
        with console.open("w") as file:
            process = subprocess.Popen(
                [*command, f"run.name={name}", "launch.ranks=1", *arguments],
                cwd=tmp_path,
                env=env | variables,
                stdout=file,
                stderr=file,
            )
        processes.append(process)
        return process, console

    def runs(*arguments, module="runs"):
        return subprocess.run(
            [sys.executable, "-m", f"distrain.{module}", *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )

    yield start, runs
    for process in processes:
        process.kill()
        process.wait()


def said(console, text):
    deadline_s = time.monotonic() + 120
    while text not in console.read_text():
        assert time.monotonic() < deadline_s, (text, console.read_text())
        time.sleep(0.05)


def test_a_nice_run_that_stepped_aside_has_the_bits_of_one_that_did_not(shared, tmp_path):
    start, runs = shared
    straight, _ = start("straight", "launch.share=true")
    nice, console = start("nice", "launch.nice=true", "launch.watchdog_s=0", PAUSED_UNTIL="go")
    said(console, "starting 1 rank on GPU 0")
    waiting, waiting_console = start("waiting", "launch.nice=true", "launch.wait=true")
    said(waiting_console, "waiting for 1 idle GPU, place 1 of 1 in the queue; GPU 0: held by")
    table = runs("gpus").stdout
    assert "/runs/nice" in table.partition("waiting")[0]
    assert "/runs/waiting" in table.partition("waiting")[2]
    found = json.loads(runs("gpus", "--json").stdout)
    assert [(gpu["uuid"], gpu["state"]) for gpu in found["gpus"]] == [("GPU-0", "nice")]
    assert [claim["pid"] for claim in found["queue"]] == [waiting.pid]
    states = {each["name"]: each["state"] for each in json.loads(runs("--json").stdout)}
    assert (states["nice"], states["waiting"]) == ("running", "queued")
    stopped = runs("stop", "waiting")
    assert (stopped.returncode, waiting.wait(60)) == (0, 75)
    gone = "stopped while it waited for its start; nothing of it is left"
    assert stopped.stdout == f"runs/waiting: {gone}\n"
    assert not (tmp_path / "runs" / "waiting").exists()

    refused, refused_console = start("other")
    assert refused.wait(60) == 2
    assert not (tmp_path / "runs" / "other").exists()
    assert (
        "launch.wait=true waits for them, and nice runs step aside" in refused_console.read_text()
    )

    other, _ = start("other", "launch.wait=true", "trainer.max_iter=5")
    said(console, "stepping aside for")
    (tmp_path / "go").touch()
    assert other.wait(120) == 0
    assert nice.wait(120) == 0
    assert "continuing after iteration" in console.read_text()
    assert straight.wait(120) == 0
    same = runs("runs/nice", "runs/straight", module="checkpoint")
    assert same.returncode == 0, same.stdout
    parts = [line for line in same.stdout.splitlines() if line.startswith(("model", "rng"))]
    assert len(parts) == 2
    assert all(line.endswith("=") for line in parts)
    assert runs("gpus").stdout.splitlines()[1].split()[-1] == "idle"

    with (tmp_path / "says").open("a") as file:
        file.write("0.processes 999999999:5\n")
    evaluated = runs("runs/nice", module="evaluate")
    assert evaluated.returncode == 2
    assert "GPU 0: used by process 999999999; launch.wait=true" in evaluated.stderr
    assert not [*(tmp_path / "runs/nice/evaluations").iterdir()]


def test_without_a_driver_the_command_says_so(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "distrain.runs", "gpus"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "DISTRAIN_LEASES": str(tmp_path / "leases")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    if not done.stdout:  # no real driver
        assert done.stderr.startswith("distrain.runs: no NVIDIA driver on this machine: ")
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "leases").exists()

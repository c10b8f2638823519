"""The run that the campaign disturbs: a small project, its command, and what the command leaves."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from distrain.checkpoint.catalog import describe, find_all  # noqa: E402
from distrain.scalar_names import NONDETERMINISTIC_PREFIXES  # noqa: E402

ROLES = ("parent", "rank", "worker", "writer", "tracker")  # the last is Python's, of shared memory
TOKEN = "DISTRAIN_FAULT_TRIAL"  # in the environment of every process of a trial, and of no other
HANG_S = 120.0  # a start that takes longer hangs

CODE = '''
import os, time
import torch
from torch import nn
from distrain import HookBase


class Noisy(torch.utils.data.Dataset):
    """Points whose noise is drawn in __getitem__; loading one takes 0.1 ms."""

    def __len__(self):
        return 97

    def __getitem__(self, index):
        time.sleep(1e-4)
        x = torch.linspace(-1, 1, 97)[index].reshape(1) + 0.01 * torch.randn(1)
        return x, x**2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 1)
        )

    def forward(self, x, y):
        return nn.functional.mse_loss(self.net(x), y)

    def metrics(self, x, y):
        error = (self.net(x) - y)[:, 0]
        return {"error": error.abs(), "bias": error}


class Progress(HookBase):
    """Notes in a file how many iterations are done, so that the campaign knows what was lost."""

    def __init__(self, pause_s=0.0):
        self._pause_s = pause_s

    def before_train(self):
        folder, rank = os.path.dirname(os.environ["TMPDIR"]), self.trainer.where.rank
        with open(os.path.join(folder, f"pid_{rank}"), "w") as file:
            file.write(str(os.getpid()))
        self._fd = os.open(os.path.join(folder, f"progress_{rank}"), os.O_RDWR | os.O_CREAT)

    def after_step(self):
        os.pwrite(self._fd, b"%8d" % self.trainer.iter_done, 0)
        time.sleep(self._pause_s)

    def after_train(self):
        os.close(self._fd)


class Linger(HookBase):
    """Holds the run up behind its last checkpoint, if the environment says so."""

    order_at_end = 99

    def after_train(self):
        if "LINGER_S" in os.environ:
            folder, rank = os.path.dirname(os.environ["TMPDIR"]), self.trainer.where.rank
            open(os.path.join(folder, f"lingers_{rank}"), "w").close()
            time.sleep(float(os.environ["LINGER_S"]))
'''

CONF = """
# @package _global_
defaults: [{override /schedule: cosine}]
run: {name: tiny}
model: {_target_: tiny.Net}
data: {batch_size: 16, workers: 1, seed_samples: true, train: {_target_: tiny.Noisy},
  eval: {_target_: tiny.Noisy}}
checkpoint: {keep_last: 2}
optim: {lr: 0.05}
trainer: {max_iter: ITERATIONS, window: 5, accumulation: 2}
schedule: {warmup_iters: 10}
hooks:
  checkpoint: {period: 10}
  eval: {period: 7}
  ema: {_target_: distrain.hooks.EMA, decay: 0.9}
  best: {_target_: distrain.hooks.BestCheckpointer, metric: eval/error, mode: min}
  best_ema: {_target_: distrain.hooks.BestCheckpointer, metric: eval_ema/bias}
  progress: {_target_: tiny.Progress, pause_s: 0.01}
  linger: {_target_: tiny.Linger}
launch: {ranks: 2}
"""


class Runner:
    """Starts the command in a folder of its own, and sees its processes.

    Args:
        folder: made here if it is not there; for the user's project, the run, temporary files.
        iterations: of the run.
    """

    def __init__(self, folder: Path, *, iterations: int) -> None:
        self.folder = folder
        self.iterations = iterations
        self.run = folder / "runs" / "tiny"
        self.temporary = folder / "tmp"
        (folder / "conf" / "experiment").mkdir(parents=True, exist_ok=True)
        self.temporary.mkdir(exist_ok=True)
        text = CONF.replace("ITERATIONS", str(iterations))
        (folder / "conf" / "experiment" / "tiny.yaml").write_text(text)
        (folder / "tiny.py").write_text(CODE)
        self.token = f"{TOKEN}={folder}"
        self.starts = 0
        self.damaged: set[str] = set()  # names of checkpoints with a flipped bit
        self._pids: set[int] = set()  # of all processes that were seen

    @contextlib.contextmanager
    def started(
        self, overrides: Sequence[str] = (), **variables: str
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Start the command; kill what is left of it at the end of the `with`.

        Args:
            overrides: more arguments.
            variables: of its environment.
        """
        name, _, value = self.token.partition("=")
        env = {
            **os.environ,
            **variables,
            name: value,
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "distrain", "--config-dir", "conf", "+experiment=tiny"]
        command += overrides
        with open(self.folder / f"start_{self.starts}.log", "wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=env,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # as in a terminal, a Ctrl-C is for the command's group
            )
        self.starts += 1
        self._pids.add(process.pid)
        try:
            yield process
        finally:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    def log(self) -> str:
        """Return what the newest start has printed."""
        path = self.folder / f"start_{self.starts - 1}.log"
        return path.read_text(errors="replace")

    def processes(self) -> dict[int, str]:
        """Return the role of every living process of this trial by its id."""
        parents, commands = {}, {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    if self.token.encode() not in file.read().split(b"\0"):
                        continue
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if stat[0] not in "ZX":
                parents[int(pid)], commands[int(pid)] = int(stat[1]), command
        roles: dict[int, str] = {}
        for pid in sorted(parents):
            if b"checkpoint.writer_process" in commands[pid]:
                roles[pid] = "writer"
            elif b"resource_tracker" in commands[pid]:
                roles[pid] = "tracker"
            elif parents[pid] not in parents:
                roles[pid] = "parent"
            else:
                is_rank = parents[parents[pid]] not in parents
                roles[pid] = "rank" if is_rank else "worker"
        self._pids |= roles.keys()
        return roles

    def rank_of(self, pid: int) -> int:
        """Return the number of the rank that a process is; -1 if it has not begun to train."""
        for rank in range(2):
            with contextlib.suppress(OSError, ValueError):
                if int((self.folder / f"pid_{rank}").read_text()) == pid:
                    return rank
        return -1

    def progress(self) -> int:
        """Return how many iterations the slower rank says are done; 0 before the first."""
        done = []
        for rank in range(2):
            try:
                done.append(int((self.folder / f"progress_{rank}").read_text() or 0))
            except (OSError, ValueError):
                done.append(0)
        return min(done)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl without what is measured on the clock."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        rows = [json.loads(line) for line in lines]
        return [
            {k: v for k, v in row.items() if not k.startswith(NONDETERMINISTIC_PREFIXES)}
            for row in rows
        ]

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Return the (step, value) pairs that TensorBoard shows for each scalar."""
        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.run), {"scalars": 0})
        events.Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if not tag.startswith(NONDETERMINISTIC_PREFIXES)
        }

    def digests(self) -> dict[str, str]:
        """Return the digests of the newest checkpoint, and its iteration; empty if it is bad."""
        found = find_all(self.run / "checkpoints")
        if not found:
            return {}
        newest = describe(found[-1])
        return {**newest.digests, "iteration": str(newest.iteration)} if newest.valid else {}

    def best(self) -> dict[str, Any]:
        """Return what best.json holds; empty without one."""
        try:
            best: dict[str, Any] = json.loads((self.run / "checkpoints" / "best.json").read_text())
        except (OSError, ValueError):
            return {}
        return best

    def leftovers(self) -> list[str]:
        """Return the files in the run's folder that a finished run does not leave there."""
        hidden = [p for p in self.run.rglob("*") if p.name.startswith(".") or p.suffix == ".new"]
        return sorted(str(p.relative_to(self.run)) for p in hidden)

    def litter(self) -> list[str]:
        """Return what is left of temporary files and shared memory, torch's cache left out."""
        names = [n for n in os.listdir(self.temporary) if not n.startswith("torchinductor_")]
        memory = [
            f"/dev/shm/{name}"
            for name in os.listdir("/dev/shm")
            if self._pids.intersection(map(int, re.findall(r"\d+", name)))
        ]
        return sorted(names + memory)

    def flip(self, rng: random.Random) -> str | None:
        """Flip one bit of the newest checkpoint; return its name, None if there is none."""
        found = find_all(self.run / "checkpoints")
        if not found:
            return None
        path = rng.choice(sorted(p for p in found[-1].iterdir() if p.stat().st_size))
        content = bytearray(path.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        self.damaged.add(found[-1].name)
        return found[-1].name


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run says: see the methods of `Runner`."""

    digests: dict[str, str]
    rows: list[dict[str, Any]]
    curves: dict[str, list[tuple[int, float]]]
    best: dict[str, Any]
    seconds: float
    first_step_s: float


def reference(folder: Path, *, iterations: int) -> Reference:
    """Run the command undisturbed.

    Raises:
        RuntimeError: that has not worked; with what was printed.
    """
    runner = Runner(folder, iterations=iterations)
    begin, first = time.monotonic(), math.nan
    with runner.started() as process:
        while process.poll() is None and time.monotonic() - begin < HANG_S:
            if math.isnan(first) and runner.progress():
                first = time.monotonic() - begin
            time.sleep(0.01)
        seconds = time.monotonic() - begin
        if process.poll() != 0:
            raise RuntimeError(f"the undisturbed run ended with {process.poll()}: {runner.log()}")
    if runner.leftovers() + runner.litter():
        raise RuntimeError(f"the undisturbed run has left {runner.leftovers() + runner.litter()}")
    return Reference(
        runner.digests(), runner.rows(), runner.curves(), runner.best(), seconds, first
    )


def differences(runner: Runner, quiet: Reference) -> list[str]:
    """Return in what a finished run differs from an undisturbed one, one line each."""
    problems = []
    digests = runner.digests()
    for part in sorted({*quiet.digests, *digests}):
        if quiet.digests.get(part) != digests.get(part):
            problems.append(f"the final {part} differs")
    rows = runner.rows()
    if rows != quiet.rows:
        where = [
            a.get("iteration", b.get("iteration"))
            for a, b in zip(rows, quiet.rows, strict=False)
            if a != b
        ]
        text = f"{len(rows)} rows, not {len(quiet.rows)}; different first at {where[:1]}"
        problems.append(f"metrics.jsonl: {text}")
    curves = runner.curves()
    for tag in sorted({*curves, *quiet.curves}):
        if curves.get(tag) != quiet.curves.get(tag):
            steps = [step for step, _ in curves.get(tag, [])]
            problems.append(f"TensorBoard: {tag} has steps {steps}")
    if runner.best() != quiet.best:
        problems.append(f"best.json: {runner.best()}, not {quiet.best}")
    if runner.leftovers():
        problems.append(f"left files {runner.leftovers()}")
    if runner.litter():
        problems.append(f"left temporary files {runner.litter()}")
    return problems

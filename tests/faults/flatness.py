"""Train a tiny model for long, and see that memory and file handles of each process stay flat.

    python tests/faults/flatness.py --iterations 400000

Two ranks with the default hooks run the command. From the end of a warm-up on, the private memory
(USS) and the open files of every process are looked at once a second. The rest of the run is cut
into two halves; of each process the most memory in the second half less the most in the first is
its growth, and likewise the median of open files, for a file may be open just then. A history keeps
up to 20,000 values of a scalar, of which it then drops the older half: so the warm-up is 20,000
iterations, and each half a whole number of 10,000, unless --history sets another bound.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median_low
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parents[2]
LIMIT_MB = 5.0
ROLES = 4  # launcher, rank 0, rank 1, checkpoint writer

CODE = """
import torch
from torch import nn
from distrain import HookBase
from distrain.events.history import HistoryBuffer

HistoryBuffer.__init__.__defaults__ = (HISTORY,)


class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 97

    def get_batch(self, indices):
        x = torch.linspace(-1, 1, 97)[indices].reshape(-1, 1)
        return x, x**2

    def __getitem__(self, index):
        return self.get_batch([index])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1)
        )

    def forward(self, x, y):
        return nn.functional.mse_loss(self.net(x), y)


class Leak(HookBase):
    def __init__(self, bytes):
        self._bytes, self._kept = bytes, []

    def after_step(self):
        self._kept.append(b"x" * self._bytes)
"""

CONF = """
# @package _global_
defaults: [{override /schedule: cosine}, {override /optim: adamw}]
run: {name: flat}
model: {_target_: flat.Net}
data: {batch_size: 8, train: {_target_: flat.Points}, eval: {_target_: flat.Points}}
optim: {lr: 0.001}
trainer: {max_iter: ITERATIONS, clip_norm: 1.0}
schedule: {warmup_iters: 10}
hooks:
  checkpoint: {period: PERIOD}
  eval: {period: PERIOD}
launch: {ranks: 2}
"""


class Sample(NamedTuple):
    """What one process held once.

    Attributes:
        iteration: that the run had written last.
        uss_mb: memory that is its own.
        num_fds: open files.
    """

    iteration: int
    uss_mb: float
    num_fds: int


class Growth(NamedTuple):
    """How much more one process held in the second half than in the first.

    Attributes:
        uss_mb: memory of its own, at most. num_fds: open files, the median.
        most_mb: the most that it ever held.
    """

    uss_mb: float
    num_fds: int
    most_mb: float

    @property
    def is_flat(self) -> bool:
        """Whether memory grew by less than LIMIT_MB, and open files by none."""
        return self.uss_mb < LIMIT_MB and self.num_fds <= 0


def growth(samples: Sequence[Sample], *, warmup: int, iterations: int) -> Growth:
    """Return how much the process grew after the warm-up.

    Args:
        samples: of one process.
        warmup: iterations that are not looked at.
        iterations: of the whole run.

    Raises:
        ValueError: one of the halves has no sample.
    """
    middle = (warmup + iterations) // 2
    first = [each for each in samples if warmup <= each.iteration < middle]
    second = [each for each in samples if middle <= each.iteration]
    if not first or not second:
        raise ValueError(f"{len(first)} and {len(second)} samples: the run was too short")
    more_mb = max(each.uss_mb for each in second) - max(each.uss_mb for each in first)
    more_fds = median_low(each.num_fds for each in second)
    more_fds -= median_low(each.num_fds for each in first)
    return Growth(more_mb, more_fds, max(each.uss_mb for each in samples))


def write(folder: Path, *, iterations: int, history: int = 10_000) -> None:
    """Write the project of a run into an empty folder."""
    (folder / "conf" / "experiment").mkdir(parents=True)
    conf = CONF.replace("ITERATIONS", str(iterations))
    conf = conf.replace("PERIOD", str(max(100, iterations // 100)))
    (folder / "conf" / "experiment" / "flat.yaml").write_text(conf)
    (folder / "flat.py").write_text(CODE.replace("HISTORY", str(history)))


@contextlib.contextmanager
def started(folder: Path, *overrides: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start the command in a folder; end it, if it has not ended, with the `with`."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    command = [sys.executable, "-m", "distrain", "--config-dir", "conf", "+experiment=flat"]
    with open(folder / "console.log", "wb") as log:
        process = subprocess.Popen(
            [*command, *overrides],
            cwd=folder,
            env=env,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
        )
    try:
        yield process
    finally:
        if process.poll() is None:  # its ranks end with it
            process.kill()
        process.wait()


def measure(
    folder: Path,
    *,
    iterations: int,
    history: int = 10_000,
    overrides: Sequence[str] = (),
    every_s: float = 1.0,
) -> dict[str, list[Sample]]:
    """Train, and return the samples of each process by its role.

    Args:
        folder: empty, for all files.
        iterations: to train.
        history: values of a scalar that are kept.
        overrides: of the command.
        every_s: from one sample to the next.

    Raises:
        RuntimeError: the command failed; with what it said.
    """
    write(folder, iterations=iterations, history=history)
    samples: defaultdict[str, list[Sample]] = defaultdict(list)
    with started(folder, *overrides) as process:
        while process.poll() is None:
            iteration = _iteration(folder / "runs" / "flat" / "metrics.jsonl")
            processes = _processes(process.pid)
            if len(processes) < ROLES:  # what the launcher shares with its ranks is its own then
                processes = {}
            for role, each in processes.items():
                with contextlib.suppress(psutil.Error):
                    memory_mb = each.memory_full_info().uss / 2**20
                    samples[role].append(Sample(iteration, memory_mb, each.num_fds()))
            time.sleep(every_s)
        if process.returncode != 0:
            raise RuntimeError((folder / "console.log").read_text(errors="replace")[-2000:])
    return samples


def _processes(pid: int) -> dict[str, psutil.Process]:
    """Return the processes of a run by role: launcher, rank 0, rank 1, checkpoint writer."""
    found = {}
    with contextlib.suppress(psutil.Error):
        found["launcher"] = launcher = psutil.Process(pid)
        ranks = sorted(launcher.children(), key=lambda each: each.pid)
        for number, rank in enumerate(ranks):
            found[f"rank {number}"] = rank
            for child in rank.children():
                if any("checkpoint.writer_process" in word for word in child.cmdline()):
                    found["checkpoint writer"] = child
    return found


def _iteration(path: Path) -> int:
    """Return the last iteration in a metrics.jsonl; -1 without one."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 10_000))
            last = file.read().splitlines()[-1]
        return int(json.loads(last)["iteration"])
    except (OSError, ValueError, IndexError):
        return -1


def table(found: Mapping[str, Growth]) -> str:
    """Return a line for each process."""
    lines = [f"{'process':<18} {'most MB':>8} {'growth MB':>9} {'more files':>10}"]
    for role, each in found.items():
        lines.append(f"{role:<18} {each.most_mb:>8.1f} {each.uss_mb:>9.2f} {each.num_fds:>10}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; 1 if a process was not flat."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=400_000)
    parser.add_argument("--warmup", type=int, help="iterations; by default 2 histories")
    parser.add_argument("--history", type=int, default=10_000, help="values kept of a scalar")
    parser.add_argument("--leak", type=int, help="bytes that a hook keeps in each iteration")
    options = parser.parse_args(arguments)
    warmup = 2 * options.history if options.warmup is None else options.warmup
    overrides = []
    if options.leak:
        overrides = ["+hooks.leak._target_=flat.Leak", f"+hooks.leak.bytes={options.leak}"]
    with tempfile.TemporaryDirectory() as folder:
        samples = measure(
            Path(folder),
            iterations=options.iterations,
            history=options.history,
            overrides=overrides,
        )
    found = {
        role: growth(of_role, warmup=warmup, iterations=options.iterations)
        for role, of_role in samples.items()
    }
    print(f"{options.iterations} iterations, the first {warmup} not looked at")
    print(table(found))
    return int(not all(each.is_flat for each in found.values()))


if __name__ == "__main__":
    raise SystemExit(main())

"""From the command to the first step on two ranks, beside torchrun with a bare script.

And what must be quick without torch: `--help`, and a mistake in the configuration.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import estimate, print_table

ROOT = Path(__file__).parents[1]
OURS = [
    *(sys.executable, "-m", "distrain", "+experiment=digits", "launch.ranks=2"),
    *("trainer.max_iter=1", "schedule.warmup_iters=0", "hooks.best=null", "hooks.eval=null"),
    "+hooks.first._target_=benchmarks.first_step.FirstStep",
]
BARE = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    *("-m", "benchmarks.bare_digits"),
]
SLOW_IMPORTS = ("torch", "tensorboard", "submitit", "rich", "sklearn")
WITHOUT_TORCH = {
    "--help": ["--help"],
    "a mistake": ["+experiment=digits", "trainer.max_iters=3"],
}


class Start(NamedTuple):
    """One start of two ranks."""

    first_step_s: float  # of the later rank
    end_s: float
    memory_mb: float  # of the larger rank, at its first step


def start(command: list[str]) -> Start:
    """Run a command in an empty folder to its end.

    Raises:
        RuntimeError: it failed; with what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"FIRST_STEP": folder, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        begin = time.time()
        ended = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
        end_s = time.time() - begin
        if ended.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{ended.stdout}\n{ended.stderr}")
        notes = [Path(folder, rank).read_text().split() for rank in "01"]
    first_step_s = max(float(at) for at, _ in notes) - begin
    return Start(first_step_s, end_s, max(float(memory_mb) for _, memory_mb in notes))


def without_torch_s(arguments: list[str]) -> float:
    """Return the seconds of a command that trains nothing."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "distrain", *arguments]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    return time.perf_counter() - begin


def slow_imports(arguments: list[str]) -> list[str]:
    """Return which of the slow packages a command imports."""
    command = [sys.executable, "-X", "importtime", "-m", "distrain", *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    return [name for name in SLOW_IMPORTS if name in imported]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    start(OURS)  # files come from the disk once
    start(BARE)
    ours, bare = [], []
    for _ in range(rounds):
        bare.append(start(BARE))
        ours.append(start(OURS))
    ratio = estimate(a.first_step_s / b.first_step_s for a, b in zip(ours, bare, strict=True))
    over_mb = estimate(a.memory_mb - b.memory_mb for a, b in zip(ours, bare, strict=True))
    print_table(
        f"Start of two ranks, seconds of wall time ({rounds} rounds; 95 %)",
        ["", "to the first step", "to the end", "MB of a rank", "target"],
        [
            _row("torchrun, bare script", bare, ""),
            _row(
                "distrain",
                ours,
                f"ratio <= 1.25: {ratio:.2f}; memory <= 30 MB over bare: {over_mb:.0f}",
            ),
        ],
    )
    rows = []
    for name, arguments in WITHOUT_TORCH.items():
        seconds = estimate(without_torch_s(arguments) for _ in range(rounds))
        rows.append([name, f"{seconds:.2f}", ", ".join(slow_imports(arguments)) or "none"])
    print_table(
        f"Commands that train nothing ({rounds} rounds; target: 0.4 s, no slow import)",
        ["", "s", f"imports of {', '.join(SLOW_IMPORTS)}"],
        rows,
    )


def _row(name: str, starts: list[Start], target: str) -> list[str]:
    return [
        name,
        f"{estimate(s.first_step_s for s in starts):.2f}",
        f"{estimate(s.end_s for s in starts):.2f}",
        f"{estimate(s.memory_mb for s in starts).median:.0f}",
        target,
    ]


if __name__ == "__main__":
    main()

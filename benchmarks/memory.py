"""What memory a rank of ours holds over that of a bare loop, as the kernel counts it.

Each round starts a process of each kind: a bare loop that logs to TensorBoard, and ours with all
default hooks and writers, where the checkpoint hook never saves. Both train the small MLP for as
many steps. USS is what a process has for itself: what it would give back if it ended.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from benchmarks.common import estimate, print_table

TARGET_MB = 30


def train(name: str, num_scalars: int, steps: int) -> float:
    """Train in this process; return its USS at the end, in MB."""
    import torch

    from benchmarks.models import mlp, new_batches, new_optimizer

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if name == "bare":
            from benchmarks.bare_loop import bare_loop

            batches = itertools.islice(itertools.cycle(new_batches((64,))), steps)
            bare_loop(mlp(), Path(folder))(batches)
        else:
            from benchmarks.ours import PutsScalars, default_hooks, new_scalars
            from distrain import Trainer

            model = mlp()
            optimizer = new_optimizer(model)
            hooks = default_hooks(optimizer, Path(folder))
            hooks["scalars"] = PutsScalars(new_scalars(num_scalars, "float"))
            Trainer(model, optimizer, new_batches((64,)), hooks=hooks).train(0, steps)
        return psutil.Process().memory_full_info().uss / 1e6


def measured(name: str, num_scalars: int, steps: int) -> float:
    """Return the USS of a process that trains, in MB."""
    code = f"from benchmarks.memory import train; print(train({name!r}, {num_scalars}, {steps}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5000)
    options = parser.parse_args()
    rows = []
    for num_scalars in (1, 30):
        bare, over = [], []
        for _ in range(options.rounds):
            bare.append(measured("bare", num_scalars, options.steps))
            over.append(measured("ours", num_scalars, options.steps) - bare[-1])
        met = "yes" if estimate(over).median <= TARGET_MB else "NO"
        rows.append([num_scalars, f"{estimate(bare):.0f}", f"{estimate(over):.1f}", met])
    print_table(
        f"Memory of a rank after {options.steps} steps, MB ({options.rounds} rounds, range)",
        ["scalars", "bare loop", "ours over bare", f"<= {TARGET_MB}"],
        rows,
    )


if __name__ == "__main__":
    main()

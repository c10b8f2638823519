"""What a step of ours costs over a bare loop, in one process; blocks of 200 steps take turns.

A round is ten blocks of each, so that it holds all that ours does now and then.

The bare loop logs its loss to TensorBoard every 20 steps and does nothing else. Ours has all
default hooks, all writers (the console's lines go to a file) and as many scalars put each step as
the table says, beside the loss, the learning rate and the two times that its hooks put.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.bare_loop import bare_loop
from benchmarks.common import Estimate, Turns, estimate, percentile, print_table
from benchmarks.models import MODELS, new_batches, new_optimizer
from benchmarks.ours import PutsScalars, default_hooks, new_scalars
from distrain import Trainer


class Case(NamedTuple):
    """One row of the table."""

    model: str
    num_scalars: int
    kind: str  # "float", "tensor" or "float, one by one"
    target_us: float | None = None  # over bare, from the issue
    target_ratio: float | None = None


CASES = (
    Case("mlp", 1, "float", 10),
    Case("mlp", 1, "tensor", 10),
    Case("mlp", 30, "float", 20),
    Case("mlp", 30, "tensor", 20),
    Case("mlp", 30, "float, one by one"),
    Case("mlp", 300, "float", 150),
    Case("mlp", 300, "tensor", 150),
    Case("conv net", 1, "float", target_ratio=1.01),
)


def measure(case: Case, *, max_s: float, precision_us: float) -> Turns:
    """Let bare and ours take turns on one case."""
    build, shape = MODELS[case.model]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        turns = Turns(
            new_batches(shape),
            bare_loop(build(), folder / "bare"),
            block=200 if case.model == "mlp" else 10,
            blocks=10 if case.model == "mlp" else 4,
            max_s=max_s,
            precision_us=precision_us,
        )
        model = build()
        optimizer = new_optimizer(model)
        hooks = default_hooks(optimizer, folder)
        hooks["scalars"] = PutsScalars(
            new_scalars(case.num_scalars, case.kind), one_by_one="one by one" in case.kind
        )
        gc.collect()
        gc.freeze()
        Trainer(model, optimizer, turns, hooks=hooks).train(0, 10**9)
    return turns


def describe(case: Case, turns: Turns) -> list[object]:
    """Return the row of a case."""
    over = estimate(r.over_us for r in turns.rounds)
    ratio = estimate(r.ours.cpu_s / r.bare.cpu_s for r in turns.rounds)
    slow = percentile(turns.our_steps_s, 99) / percentile(turns.bare_steps_s, 99)
    return [
        case.model,
        case.num_scalars,
        case.kind,
        f"{estimate(r.bare.cpu_s * 1e6 for r in turns.rounds).median:.0f}",
        f"{over:.1f}",
        f"{estimate(r.over_wall_us for r in turns.rounds):.1f}",
        f"{ratio:.3f}",
        f"{slow:.2f}",
        len(turns.rounds),
        _verdict(case, over, ratio),
    ]


def _verdict(case: Case, over: Estimate, ratio: Estimate) -> str:
    if case.target_us is not None:
        return f"<= {case.target_us:g} us: {'yes' if over.median <= case.target_us else 'NO'}"
    if case.target_ratio is not None:
        met = ratio.median <= case.target_ratio
        return f"<= {case.target_ratio:g}: {'yes' if met else 'NO'}"
    return ""


def per_scalar_us(over_us: Mapping[Case, float], kind: str) -> float:
    """Return the slope between 1 and 300 scalars."""
    at = {case.num_scalars: us for case, us in over_us.items() if case.kind == kind}
    return (at[300] - at[1]) / 299


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-s", type=float, default=20, help="for each row")
    parser.add_argument("--precision-us", type=float, default=1.0, help="end a row sooner")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, over_us = [], {}
    for case in CASES:
        turns = measure(case, max_s=options.max_s, precision_us=options.precision_us)
        rows.append(describe(case, turns))
        if case.model == "mlp":
            over_us[case] = estimate(r.over_us for r in turns.rounds).median
    columns = ["model", "scalars", "put as", "bare, us CPU", "over bare, us CPU (95 %)"]
    columns += ["over bare, us wall", "CPU ratio", "p99 ratio", "rounds", "target"]
    print_table("A step of ours over a bare one, one process, batch 32", columns, rows)
    for kind in ("float", "tensor"):
        print(f"a {kind} more a step: {per_scalar_us(over_us, kind):.3f} us (target: <= 0.5)")


if __name__ == "__main__":
    main()

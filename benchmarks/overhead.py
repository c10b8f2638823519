"""What a step of ours costs over a bare loop; both live in one process and take turns.

A round is some blocks of steps of each, so that it holds all that ours does now and then. Then the
same on two gloo ranks, whose steps wander by some percent from block to block.

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
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.bare_loop import bare_loop
from benchmarks.common import Estimate, Round, Turns, estimate, percentile, print_table
from benchmarks.models import MODELS, new_batches, new_optimizer
from benchmarks.ours import PutsScalars, default_hooks, new_scalars
from benchmarks.ranks import of_both, on_two_ranks
from distrain import Trainer


class Case(NamedTuple):
    """One row of the table."""

    model: str
    num_scalars: int
    kind: str  # "float", "tensor" or "float, one by one"
    target_us: float | None = None  # over bare, from the issue
    target_ratio: float | None = None
    block: int = 200  # steps
    blocks: int = 5  # of a round: with those of bare more than a second
    in_a_row: int = 5000  # steps among which the slowest are looked for


CASES = (
    Case("mlp", 1, "float", 10),
    Case("mlp", 1, "tensor", 10),
    Case("mlp", 30, "float", 20),
    Case("mlp", 30, "tensor", 20),
    Case("mlp", 30, "float, one by one"),
    Case("mlp", 300, "float", 150),
    Case("mlp", 300, "tensor", 150),
    Case("conv net", 1, "float", target_ratio=1.01, block=2, blocks=10, in_a_row=150),
)
ON_TWO_RANKS = (
    Case("mlp", 1, "float", target_ratio=1.03, block=20, blocks=25, in_a_row=1500),
    Case("mlp", 30, "float", target_ratio=1.06, block=20, blocks=25, in_a_row=1500),
)
COLUMNS = ("model", "scalars", "put as", "bare, us CPU", "over bare, us CPU (95 %)")
COLUMNS += ("over bare, us wall", "CPU ratio", "p99 ratio", "rounds", "target")


def measure(case: Case, max_s: float, precision_us: float = 0.0, min_rounds: int = 3) -> Turns:
    """Let bare and ours take turns on one case; see `Turns` for when it ends."""
    build, shape = MODELS[case.model]
    bare_model = build()
    if dist.is_initialized():
        bare_model = DistributedDataParallel(bare_model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        turns = Turns(
            new_batches(shape),
            bare_loop(bare_model, folder / "bare"),
            block=case.block,
            blocks=case.blocks,
            max_s=max_s,
            precision_us=precision_us,
            min_rounds=min_rounds,
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


def slow_ratio(case: Case) -> float:
    """Return the slowest 1 % of our steps over that of the bare ones, of many in a row each.

    What we do once a second would come twice as often if we had to wait for a bare loop meanwhile.
    """
    turns = measure(case._replace(block=case.in_a_row, blocks=1), 0.0, min_rounds=1)
    return percentile(turns.our_steps_s, 99) / percentile(turns.bare_steps_s, 99)


def rounds_and_slow_ratio(case: Case, rounds: int) -> tuple[list[Round], float]:
    """Return both of this rank; that is little enough to be sent to another process."""
    return measure(case, 0.0, min_rounds=rounds).rounds, slow_ratio(case)


def measure_on_two_ranks(case: Case, rounds: int) -> tuple[list[Round], float]:
    """Do the same on two gloo ranks; return the cost of both, and the worse of their ratios."""
    (first, ratio), (second, other_ratio) = on_two_ranks(rounds_and_slow_ratio, case, rounds)
    both = [
        Round(of_both((a.bare, b.bare)), of_both((a.ours, b.ours)))
        for a, b in zip(first, second, strict=True)
    ]
    return both, max(ratio, other_ratio)


def describe(case: Case, rounds: list[Round], slow_ratio: float | None) -> list[object]:
    """Return the row of a case."""
    over = estimate(r.over_us for r in rounds)
    ratio = estimate(r.ours.cpu_s / r.bare.cpu_s for r in rounds)
    return [
        case.model,
        case.num_scalars,
        case.kind,
        f"{estimate(r.bare.cpu_s * 1e6 for r in rounds).median:.0f}",
        f"{over:.1f}",
        f"{estimate(r.over_wall_us for r in rounds):.1f}",
        f"{ratio:.3f}",
        "" if slow_ratio is None else f"{slow_ratio:.2f}",
        len(rounds),
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
    parser.add_argument(
        "--slowest",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="look for the slowest steps of a row, too, which takes several seconds",
    )
    parser.add_argument("--rounds", type=int, default=15, help="on two ranks; 0 leaves them out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, over_us = [], {}
    for case in CASES:
        rounds = measure(case, options.max_s, options.precision_us).rounds
        rows.append(describe(case, rounds, slow_ratio(case) if options.slowest else None))
        if case.model == "mlp":
            over_us[case] = estimate(r.over_us for r in rounds).median
    print_table("A step of ours over a bare one, one process, batch 32", COLUMNS, rows)
    for kind in ("float", "tensor"):
        print(f"a {kind} more a step: {per_scalar_us(over_us, kind):.3f} us (target: <= 0.5)")
    if options.rounds:
        rows = [describe(c, *measure_on_two_ranks(c, options.rounds)) for c in ON_TWO_RANKS]
        print_table("The same on two gloo ranks, CPU of both", COLUMNS, rows)


if __name__ == "__main__":
    main()

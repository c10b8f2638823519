"""What each option that makes a step quicker brings over the defaults; two gloo ranks on the CPU.

All variants live in the same two processes and take turns, a block of steps each. Where an option
changes numbers it says so. What GPUs make of them is `benchmarks/gpu.py`'s to tell. `+with=gc` is
not here: it is for the slowest steps, and collects where training begins, as every block does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch

from benchmarks.common import Cost, alternate, estimate, print_table
from benchmarks.models import MODELS, new_batches, new_optimizer
from benchmarks.ranks import of_both, on_two_ranks
from distrain import Trainer
from distrain.distributed.comm_hooks import CommHook
from distrain.distributed.ddp import DDP

STEPS = {"mlp": 200, "conv net": 5}  # of a block


class Option(NamedTuple):
    """One option: how a trainer is told of it."""

    name: str
    trainer: Mapping[str, Any] = {}
    ddp: Mapping[str, Any] = {}
    comm_hook: CommHook = "none"
    fused: bool = True


OPTIONS = (
    Option("defaults"),
    Option("the defaults again: what chance does"),
    Option("gradient_as_bucket_view: false", ddp={"gradient_as_bucket_view": False}),
    Option("static_graph: true", ddp={"static_graph": True}),
    Option("find_unused_parameters: true", ddp={"find_unused_parameters": True}),
    Option("comm_hook: bf16 (changes numbers)", comm_hook="bf16"),
    Option("optimizer not fused", fused=False),
    Option("channels_last: true", {"channels_last": True}),
    Option("precision: bf16 (changes numbers)", {"precision": "bf16"}),
    Option("compile: true", {"compile": True}),
)


def new_block(option: Option, model_name: str) -> Callable[[], None]:
    """Return a function that goes on training by a block of steps."""
    torch.manual_seed(0)
    build, shape = MODELS[model_name]
    model, steps, done = build(), STEPS[model_name], 0
    optimizer = new_optimizer(model, fused=option.fused)
    strategy = DDP(option.ddp, comm_hook=option.comm_hook)
    trainer = Trainer(model, optimizer, new_batches(shape), strategy=strategy, **option.trainer)

    def block() -> None:
        nonlocal done
        trainer.train(done, done + steps)
        done += steps

    return block


def measure(model_name: str, names: Collection[str], rounds: int) -> dict[str, list[Cost]]:
    """Return the costs of each option's blocks on this rank."""
    blocks = {o.name: new_block(o, model_name) for o in OPTIONS if o.name in names}
    return alternate(blocks, rounds=rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", help="options whose name begins so, beside the defaults")
    arguments = parser.parse_args()
    rounds = arguments.rounds
    for model_name in MODELS:
        names = [
            option.name
            for option in OPTIONS
            if option.name.startswith((arguments.only or "", "defaults"))
            and (model_name == "conv net" or "channels_last" not in option.trainer)
        ]
        first, second = on_two_ranks(measure, model_name, names, rounds)
        costs = {
            name: [
                of_both(pair).per(STEPS[model_name])
                for pair in zip(first[name], second[name], strict=True)
            ]
            for name in names
        }
        usual = costs["defaults"]
        rows = []
        for name, own in costs.items():
            cpu = estimate(a.cpu_s / b.cpu_s for a, b in zip(own, usual, strict=True))
            wall = estimate(a.wall_s / b.wall_s for a, b in zip(own, usual, strict=True))
            step_us = estimate(cost.cpu_s * 1e6 for cost in own).median
            rows.append([name, f"{step_us:.0f}", f"{cpu:.2f}", f"{wall:.2f}"])
        print_table(
            f"Options against the defaults: {model_name}, two ranks ({rounds} rounds, 95 %)",
            ["option", "CPU us a step, both ranks", "CPU over defaults", "wall over defaults"],
            rows,
        )


if __name__ == "__main__":
    main()

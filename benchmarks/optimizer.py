"""`optimizer.step()` on the 161 tensors of ResNet-50: our groups, fused and not, and others.

SGD with momentum and weight decay, none on norms. detectron2 was known for one group a parameter.
Ours is torch's plain loop by default, and the fused kernels with `optim.fused=true`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from benchmarks.common import alternate, estimate, print_table
from benchmarks.models import resnet50
from distrain.optim.optimizer import build_optimizer

TARGETS = {64: 2.2, 4: 3.3}  # width -> times that fused is faster than one group a parameter


def ours(model: nn.Module, *, fused: bool | None = None) -> Optimizer:
    """Return what `build_optimizer` makes: few groups."""
    return build_optimizer(
        model,
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        weight_decay_norm=0.0,
        target="torch.optim.SGD",
        fused=fused,
    )


def a_group_a_parameter(model: nn.Module) -> Optimizer:
    """Return an optimizer with 161 groups and torch's default implementation."""
    return SGD([{"params": [p]} for p in model.parameters()], 0.1, momentum=0.9, weight_decay=1e-4)


def one_group(model: nn.Module, *, foreach: bool) -> Optimizer:
    """Return an optimizer with one group."""
    return SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, foreach=foreach)


CONTESTANTS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "ours, fused": lambda model: ours(model, fused=True),
    "ours": ours,
    "161 groups, plain": a_group_a_parameter,
    "1 group, plain": lambda model: one_group(model, foreach=False),
    "1 group, foreach": lambda model: one_group(model, foreach=True),
}


def measure(width: int, *, rounds: int, steps: int) -> list[list[object]]:
    """Return the rows of one width."""
    optimizers = {}
    for name, build in CONTESTANTS.items():
        model = resnet50(width)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-3
        optimizers[name] = build(model)
    costs = alternate(
        {name: lambda o=o: [o.step() for _ in range(steps)] for name, o in optimizers.items()},
        rounds=rounds,
    )
    rows: list[list[object]] = []
    for name, optimizer in optimizers.items():
        ratio = estimate(
            theirs.cpu_s / our.cpu_s
            for theirs, our in zip(costs[name], costs["ours, fused"], strict=True)
        )
        target = TARGETS[width] if name == "161 groups, plain" else None
        rows.append(
            [
                "full" if width == 64 else "1/16",
                name,
                len(optimizer.param_groups),
                f"{estimate(cost.cpu_s * 1e3 / steps for cost in costs[name]):.2f}",
                f"{ratio:.2f}",
                "" if not target else f">= {target}: {'yes' if ratio.median >= target else 'NO'}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = measure(64, rounds=rounds, steps=5) + measure(4, rounds=rounds, steps=50)
    print_table(
        f"optimizer.step(), SGD momentum, ResNet-50's 161 tensors, one thread ({rounds} rounds)",
        ["width", "optimizer", "groups", "CPU ms (95 %)", "times ours, fused", "target"],
        rows,
    )


if __name__ == "__main__":
    main()

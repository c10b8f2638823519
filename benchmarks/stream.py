"""Seeking in the stream of samples: a batch at iteration 10^9 beside one at 0."""

from __future__ import annotations

import argparse
from itertools import islice

import torch
from torch import Tensor

from benchmarks.common import alternate, estimate, print_table
from distrain.data.loader import TrainLoader
from distrain.data.samplers import Shuffled

SIZE = 1_281_167  # images of ImageNet
BATCH_SIZE = 256
ITERATIONS = (0, 10**6, 10**9)
REPEATS = 100


class Numbers:
    """A data set that makes its batches of nothing."""

    def __len__(self) -> int:
        return SIZE

    def get_batch(self, indices: Tensor) -> Tensor:  # (n,) -> (n,)
        return indices


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    order = Shuffled(SIZE, seed=0)
    loader = TrainLoader(Numbers(), batch_size=BATCH_SIZE)

    def seek(iteration: int) -> None:
        for number in range(REPEATS):
            order.at((iteration + number) * BATCH_SIZE, BATCH_SIZE)

    def resume(iteration: int) -> None:
        for _ in range(REPEATS):
            next(loader.batches(iteration))

    def go_on(iteration: int) -> None:
        for _ in islice(loader.batches(iteration), REPEATS):
            pass

    rows = []
    for what, function in (
        ("indices of a batch", seek),
        ("first batch after a resume", resume),
        ("each batch after that", go_on),
    ):
        costs = alternate(
            {str(at): lambda at=at, f=function: f(at) for at in ITERATIONS}, rounds=rounds
        )
        us = {name: estimate(c.cpu_s * 1e6 / REPEATS for c in costs[name]) for name in costs}
        first, last = costs["0"], costs[str(ITERATIONS[-1])]
        ratio = estimate(b.cpu_s / a.cpu_s for a, b in zip(first, last, strict=True))
        rows.append([what, *(f"{us[str(at)]:.1f}" for at in ITERATIONS), f"{ratio:.2f}"])
    print_table(
        f"CPU us at an iteration, {SIZE:,} samples in batches of {BATCH_SIZE} ({rounds} rounds)",
        ["", *(f"{at:,}" for at in ITERATIONS), "last over first (target: 1)"],
        rows,
    )


if __name__ == "__main__":
    main()

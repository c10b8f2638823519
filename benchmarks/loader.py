"""Batches from loader processes: distrain's and torch's DataLoader in turns, in one run.

    python -m benchmarks.loader [--rounds 5]

Per case and round both load the same batches, and the trainer reads one value of each. Printed are
the medians of batches per second and of the training process's CPU time per batch, and the ratios
of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distrain.data.loader import TrainLoader

_WARM_UP = 12


class Samples(Dataset[tuple[Tensor, int]]):
    """Float samples of a shape, made of bytes as an image decoder's are."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(self.shape, dtype=torch.uint8).float().div_(255), index % 10


class Case(NamedTuple):
    name: str
    shape: tuple[int, ...]
    batch_size: int
    batches: int


CASES = [
    Case("images, 19 MB", (3, 224, 224), 32, 100),
    Case("images, 1.2 MB", (3, 56, 56), 32, 300),
    Case("vectors, 8 kB", (64,), 32, 1500),
]


def ours(case: Case, workers: int) -> Iterator[Any]:
    """Return distrain's batches; samples are not seeded, as torch's are not."""
    loader = TrainLoader(
        Samples(case.shape), batch_size=case.batch_size, workers=workers, seed_samples=False
    )
    return loader.batches(0)


def torchs(case: Case, workers: int) -> Iterator[Any]:
    """Return the DataLoader's batches, shuffled, too."""
    data = Samples(case.shape)
    return iter(DataLoader(data, batch_size=case.batch_size, shuffle=True, num_workers=workers))


def measure(batches: Iterator[Any], number: int) -> tuple[float, float]:
    """Return batches per second, and CPU microseconds of this process per batch."""
    for images, _ in islice(batches, _WARM_UP):
        images.flatten()[0].item()
    started, cpu = time.perf_counter(), time.process_time()
    for images, _ in islice(batches, number):
        images.flatten()[0].item()
    cpu_us = (time.process_time() - cpu) * 1e6 / number
    return number / (time.perf_counter() - started), cpu_us


def compare(case: Case, workers: int, rounds: int) -> str:
    """Return a row of the table."""
    found: list[list[tuple[float, float]]] = [[], []]
    for turn in range(rounds):
        kinds = [(0, ours), (1, torchs)]
        for kind, make in kinds if turn % 2 == 0 else kinds[::-1]:
            found[kind].append(measure(make(case, workers), case.batches))
    speeds, costs = ([median(of[part] for of in kind) for kind in found] for part in (0, 1))
    pairs = [*zip(*found, strict=True)]
    ratios = [median(a[part] / b[part] for a, b in pairs) for part in (0, 1)]
    return (
        f"| {case.name} | {workers} | {speeds[0]:,.0f} | {speeds[1]:,.0f} | {ratios[0]:.2f} "
        f"| {costs[0]:,.0f} | {costs[1]:,.0f} | {ratios[1]:.2f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| batches | workers | batches/s | torch | ratio | CPU us | torch | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        for workers in (1, 2):
            print(compare(case, workers, rounds), flush=True)


if __name__ == "__main__":
    main()

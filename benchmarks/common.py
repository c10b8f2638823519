"""Measuring two things side by side on a machine that others use too.

What is compared takes turns, round after round, so that all of it meets the same weather. A figure
is the median over rounds with the interval that holds the true median at 95 %. CPU time counts all
threads of the process; it does not grow while others have the core, which makes it the better
clock here. Wall time stands beside it.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from distrain import get_event_storage
from distrain.distributed.ranks import local_device

SETTLE_S = 0.003  # who works for less than a tenth of it has settled


class Cost(NamedTuple):
    """What something took, in seconds."""

    cpu_s: float
    wall_s: float

    def per(self, num: int) -> Cost:
        """Return the cost of one of `num`."""
        return Cost(self.cpu_s / num, self.wall_s / num)


def total(costs: Iterable[Cost]) -> Cost:
    """Return the sum of some costs."""
    cpu_s, wall_s = zip(*costs, strict=True)
    return Cost(sum(cpu_s), sum(wall_s))


class Estimate(NamedTuple):
    """A median and the 95 % interval around it."""

    median: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """How far off the median may be."""
        return (self.high - self.low) / 2

    def __format__(self, spec: str) -> str:
        """Show as `median (low..high)`."""
        return f"{self.median:{spec}} ({self.low:{spec}}..{self.high:{spec}})"


def estimate(values: Iterable[float]) -> Estimate:
    """Return the median of some values, with its interval from order statistics.

    The number of values below the true median is binomial(n, 1/2), about n / 2 +- 0.98 sqrt(n) at
    95 % (Conover, "Practical nonparametric statistics", section 3.2); no shape is assumed. With
    fewer than six values the interval is their range.
    """
    ordered = sorted(values)
    n = len(ordered)
    first = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n)) - 1) if n >= 6 else 0
    return Estimate(statistics.median(ordered), ordered[first], ordered[n - 1 - first])


def settle_threads() -> None:
    """Wait until the other threads of this process have done what they were given.

    While they write, the CPU time grows; it is to count for those who gave them the work.
    """
    busy_s = SETTLE_S
    while busy_s > SETTLE_S / 10:
        cpu_s = time.process_time()
        time.sleep(SETTLE_S)
        busy_s = time.process_time() - cpu_s


class Stopwatch:
    """Measures what runs inside `with Stopwatch() as watch`, then `watch.cost`.

    What other threads do because of it counts as CPU time, and not as wall time.
    """

    cost: Cost

    def __enter__(self) -> Stopwatch:
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall_s = time.perf_counter() - self._wall_s
        settle_threads()
        self.cost = Cost(time.process_time() - self._cpu_s, wall_s)


def alternate(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int
) -> dict[str, list[Cost]]:
    """Run each contestant once a round; return its costs in the order of the rounds.

    One round before them is not counted. Each round starts with another contestant.
    """
    costs: dict[str, list[Cost]] = {name: [] for name in contestants}
    names = list(contestants)
    for number in range(-1, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            with Stopwatch() as watch:
                contestants[name]()
            if number >= 0:
                costs[name].append(watch.cost)
    return costs


@dataclass(frozen=True)
class Round:
    """Some blocks of bare steps and of ours, one after the other; costs of one step."""

    bare: Cost
    ours: Cost

    @property
    def over_us(self) -> float:
        """Microseconds of CPU that one of our steps takes over a bare one."""
        return (self.ours.cpu_s - self.bare.cpu_s) * 1e6

    @property
    def over_wall_us(self) -> float:
        """The same by the clock on the wall."""
        return (self.ours.wall_s - self.bare.wall_s) * 1e6


class Turns:
    """Batches for a Trainer that let a bare loop take turns with it, in one process.

    The trainer asks for a batch at the begin of each step. When it asks for the first of a new
    block, the bare loop runs a block of its own first. Both get their batches from here. A round
    is several blocks of each, for what ours does once in a second has to be in every round.

    Args:
        batches: used over and over.
        bare: trains on the batches that it is given.
        block: steps in a block. blocks: of a round, of each of the two.
        max_s: no new round after so many seconds. On several ranks, rank 0 decides.
        precision_us: nor once the CPU difference is known to this many microseconds.
        min_rounds: but never before so many.
        settle: called at both ends of a block, such as `torch.cuda.synchronize`.

    Attributes:
        rounds: what was measured. bare_steps_s, our_steps_s: the time of every single step.
    """

    def __init__(
        self,
        batches: Sequence[Any],
        bare: Callable[[Iterable[Any]], None],
        *,
        block: int = 200,
        blocks: int = 5,
        max_s: float = 20.0,
        precision_us: float = 0.0,
        min_rounds: int = 3,
        settle: Callable[[], object] = lambda: None,
    ) -> None:
        self._batches, self._bare = batches, bare
        self._block, self._blocks = block, blocks
        self._max_s, self._precision_us, self._min_rounds = max_s, precision_us, min_rounds
        self._settle = settle
        self.rounds: list[Round] = []
        self.bare_steps_s: list[float] = []
        self.our_steps_s: list[float] = []

    def __iter__(self) -> Iterator[Any]:
        """Yield the trainer's batches; ask it to stop when enough is known."""
        self._bare(self._give([]))  # warm up
        yield from self._give([])
        self._end_s = time.perf_counter() + self._max_s
        while not self._is_enough():
            bare_costs, our_costs = [], []
            for _ in range(self._blocks):
                self._settle()
                with Stopwatch() as bare:
                    self._bare(self._give(self.bare_steps_s))
                    self._settle()
                with Stopwatch() as ours:
                    yield from self._give(self.our_steps_s)  # comes back after the last step
                    self._settle()
                bare_costs.append(bare.cost)
                our_costs.append(ours.cost)
            steps = self._block * self._blocks
            self.rounds.append(Round(total(bare_costs).per(steps), total(our_costs).per(steps)))
        get_event_storage().early_stop = True
        yield from itertools.cycle(self._batches)

    def _give(self, steps_s: list[float]) -> Iterator[Any]:
        """Yield the batches of one block, and note how long each step took."""
        begin = time.perf_counter()
        for batch in itertools.islice(itertools.cycle(self._batches), self._block):
            yield batch
            now = time.perf_counter()
            steps_s.append(now - begin)
            begin = now

    def _is_enough(self) -> bool:
        if len(self.rounds) < self._min_rounds:
            return False
        half_width = estimate(r.over_us for r in self.rounds).half_width
        is_enough = half_width < self._precision_us or time.perf_counter() > self._end_s
        if dist.is_initialized():
            of_main = torch.tensor([is_enough], dtype=torch.int32, device=local_device())
            dist.broadcast(of_main, src=0)
            is_enough = bool(of_main)
        return is_enough


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that `percent` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table in Markdown, numbers as they are given."""
    cells = [list(columns), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[c]) for row in cells) for c in range(len(columns))]
    print(f"\n### {title}")
    for number, row in enumerate(cells):
        print("| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(flush=True)

"""What our loop costs one rank as ranks and scalars grow: 2 to 4,096 ranks in one process.

torch's fake process group answers every collective at once and does nothing, so that what is left
is the work of this rank: hooks, putting, packing, folding, writing. There is no model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import distrain.trainer.loop
from benchmarks.common import Cost, estimate, print_table
from benchmarks.ours import default_hooks, new_scalars
from distrain import TrainerBase
from distrain.hooks import straggler

RANKS = (2, 64, 4096)
SCALARS = (1, 30, 300, 1000)
WARM_UP = 40  # iterations until names are known to all and windows are regular
STEPS = 400
WRITERS_S = 0.5  # for the thread beside training to write its rows


class Loop(TrainerBase):
    """A loop whose step only puts scalars; it measures itself between two iterations."""

    data_s = 0.0
    device, data = torch.device("cpu"), ()
    cost: Cost

    def __init__(self, num_scalars: int, folder: Path) -> None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        super().__init__(default_hooks(optimizer, folder))
        self._scalars = new_scalars(num_scalars, "float")

    def run_step(self) -> None:
        if self.iter == WARM_UP:
            self._settle()
            self._begin = time.process_time(), time.perf_counter()
        elif self.iter == WARM_UP + STEPS:
            wall_s = time.perf_counter() - self._begin[1]
            self._settle()
            self.cost = Cost(time.process_time() - self._begin[0], wall_s).per(STEPS)
        self.storage.put_scalars(**self._scalars)

    def _settle(self) -> None:
        """Finish what is put off for a second: combining and writing."""
        self.reduction.drain(self.storage.iter)
        self.hooks["writer"].after_step()
        time.sleep(WRITERS_S)


def one_rank_of(num_ranks: int, run: Callable[[], Cost]) -> Cost:
    """Return the cost of `run` as rank 0 of so many."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=num_ranks)
    names = dist.HashStore()  # the fake store keeps nothing
    try:
        # the loop would make a gloo group, which waits for the others
        with (
            patch.object(distrain.trainer.loop, "new_cpu_group", lambda: dist.group.WORLD),
            patch.object(distrain.trainer.loop, "default_store", lambda: names),
            patch.object(straggler, "gather_to_all", lambda mine: [mine] * num_ranks),
        ):
            return run()
    finally:
        dist.destroy_process_group()


def loop_cost(num_scalars: int) -> Cost:
    """Run the loop and return the cost of one step."""
    with tempfile.TemporaryDirectory() as folder:
        loop = Loop(num_scalars, Path(folder))
        with patch.object(loop, "state_dict", dict):  # there is no checkpoint to make room for
            loop.train(0, WARM_UP + STEPS + 1)
    return loop.cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = []
    flat_us: dict[int, float] = {}
    for num_scalars in SCALARS:
        cpu_us: dict[int, list[float]] = {num_ranks: [] for num_ranks in RANKS}
        for number in range(-1, rounds):
            for num_ranks in RANKS if number % 2 else reversed(RANKS):
                cost = one_rank_of(num_ranks, lambda: loop_cost(num_scalars))  # noqa: B023
                if number >= 0:
                    cpu_us[num_ranks].append(cost.cpu_s * 1e6)
        growth = estimate(
            most / few for most, few in zip(cpu_us[RANKS[-1]], cpu_us[RANKS[0]], strict=True)
        )
        flat_us[num_scalars] = estimate(cpu_us[RANKS[-1]]).median
        rows.append(
            [num_scalars]
            + [f"{estimate(cpu_us[num_ranks]):.1f}" for num_ranks in RANKS]
            + [f"{growth:.2f}", "yes" if growth.low <= 1.1 else "NO"]
        )
    print_table(
        f"CPU us a step of one rank without a model ({rounds} rounds of {STEPS} steps, 95 %)",
        ["scalars", *(f"{n} ranks" for n in RANKS), "4,096 over 2 ranks", "<= 1.1"],
        rows,
    )
    slope = (flat_us[SCALARS[-1]] - flat_us[1]) / (SCALARS[-1] - 1)
    print(f"a scalar more: {slope:.3f} us a step at {RANKS[-1]} ranks (target: < 1)")


if __name__ == "__main__":
    main()

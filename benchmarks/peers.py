"""Two gloo ranks: a bare DDP loop, ours, and the peers that are installed; all take turns.

Every contestant is two processes that train all the time, and wait for their next batch while it
is the turn of others. All train the same small MLP with the same optimizer on the same batches, and
bring the mean over ranks of 1 or 30 scalars to TensorBoard (or what the peer has) every 20 steps;
bare logs its loss on rank 0. Where a peer has no such thing, its part is written as its manual
would have it. Ours combines a second of steps at once, so it is brought up to date at both ends of
a turn. Bare takes part twice: how far it is from itself is what chance does.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.common import Cost, estimate, print_table
from benchmarks.contestants import TRAIN, WINDOW, Batches, Enough, Task
from benchmarks.ours import new_scalars
from benchmarks.ranks import of_both

TURN_S = 0.7  # of a contestant in a round
FIRST_STEPS = 3 * WINDOW  # of the first turn, which is not counted
ANSWER_S = 300  # the first answer waits for the imports of all contestants at once
PR_SET_PDEATHSIG = 1  # linux/prctl.h
REQUIRES = {
    "bare DDP": "torch",
    "bare DDP again": "torch",
    "distrain": "torch",
    "accelerate": "accelerate",
    "torchtnt": "torchtnt",
    "mmengine": "mmengine",
    "lightning": "lightning",
    "transformers": "transformers",
}


def be_rank(name: str, rank: int, meeting: str, pipe: Connection) -> None:
    """Be one rank of a contestant: train each time that the pipe says with how many scalars."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", NODE_RANK="0"
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", GLOO_SOCKET_IFNAME="lo")
    warnings.simplefilter("ignore")
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # the peers' own lines
    if "PEERS_STDERR" not in os.environ:
        os.dup2(silence, 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    while (num_scalars := pipe.recv()) is not None:
        scalars = dict(new_scalars(num_scalars if num_scalars > 1 else 0, "float"))
        with tempfile.TemporaryDirectory() as folder:
            try:
                TRAIN[name](Task(Batches(pipe), Path(folder), scalars))
            except Enough:
                pass
            except Exception as error:
                pipe.send(f"{type(error).__name__}: {error}")
                raise
    dist.destroy_process_group()


class Contestant:
    """Two processes that train when they are told to."""

    def __init__(self, name: str, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipes = []
        self._ranks = []
        for rank in range(2):
            here, there = context.Pipe()
            arguments = (name, rank, f"{folder}/{name.replace(' ', '_')}", there)
            process = context.Process(target=be_rank, args=arguments, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._ranks.append(process)

    def tell(self, message: int | None) -> None:
        """Send both ranks a number of scalars, then numbers of steps, then None for the end."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # it has failed, and said so
                pipe.send(message)

    def train(self, steps: int) -> Cost | str:
        """Return the cost of a step: CPU of both ranks together, wall of the slower; or why not."""
        self.tell(steps)
        answers = []
        for pipe in self._pipes:
            if not pipe.poll(ANSWER_S):
                return f"no answer in {ANSWER_S} s"
            answers.append(pipe.recv())
        failed = [answer for answer in answers if isinstance(answer, str)]
        if failed:
            return failed[0]
        return of_both(answers)

    def close(self) -> None:
        """End the processes."""
        self.tell(None)
        for process in self._ranks:
            process.join(10)
            process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--only", nargs="*", help="names of contestants besides bare DDP")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    found = [name for name, module in REQUIRES.items() if importlib.util.find_spec(module)]
    if options.only:
        found = [name for name in found if name in ("bare DDP", *options.only)]
    with tempfile.TemporaryDirectory() as folder:
        contestants = [Contestant(name, folder) for name in found]
        try:
            for num_scalars in (1, 30):
                play(contestants, num_scalars, rounds=options.rounds)
        finally:
            for contestant in contestants:
                contestant.close()
    if missing := REQUIRES.keys() - set(found):
        print(f"not installed or not asked for: {', '.join(sorted(missing))}")


def play(contestants: list[Contestant], num_scalars: int, *, rounds: int) -> None:
    """Let all train in turns and print the table; who fails is removed from the list."""
    costs: dict[str, list[Cost]] = {c.name: [] for c in contestants}
    steps = dict.fromkeys(costs, FIRST_STEPS)
    for contestant in contestants:
        contestant.tell(num_scalars)
    for number in range(-1, rounds):
        shift = number % len(contestants)  # another one begins
        for contestant in contestants[shift:] + contestants[:shift]:
            cost = contestant.train(steps[contestant.name])
            if isinstance(cost, str):
                if contestant.name == "bare DDP":
                    raise SystemExit(f"no bare loop, no table: {cost}")
                print(f"{contestant.name} is left out: {cost}", file=sys.stderr)
                contestants.remove(contestant)
                del costs[contestant.name]
            elif number >= 0:
                costs[contestant.name].append(cost)
            else:  # whole windows
                windows = max(1, int(TURN_S / cost.wall_s / WINDOW))
                steps[contestant.name] = windows * WINDOW
    for contestant in contestants:
        contestant.tell(None)
    bare = costs["bare DDP"]
    rows = []
    for name, own in costs.items():
        cpu = sorted(a.cpu_s / b.cpu_s for a, b in zip(own, bare, strict=True))
        wall = sorted(a.wall_s / b.wall_s for a, b in zip(own, bare, strict=True))
        version = importlib.metadata.version(REQUIRES[name]) if name != "distrain" else ""
        rows.append(
            [
                f"{name} {version}".strip(),
                f"{estimate(c.cpu_s * 1e6 for c in own).median:.0f}",
                f"{estimate(cpu).median:.2f} ({cpu[0]:.2f}..{cpu[-1]:.2f})",
                f"{estimate(c.wall_s * 1e6 for c in own).median:.0f}",
                f"{estimate(wall).median:.2f} ({wall[0]:.2f}..{wall[-1]:.2f})",
            ]
        )
    print_table(
        f"Two gloo ranks, MLP 64-64-10, {num_scalars} scalars a step "
        f"({rounds} rounds, turns of {TURN_S:g} s; median and range)",
        ["", "CPU us a step, both ranks", "CPU over bare", "wall us a step", "wall over bare"],
        rows,
    )


if __name__ == "__main__":
    main()

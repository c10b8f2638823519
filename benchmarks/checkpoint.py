"""What training feels of a checkpoint of 100 MB: the wait for its copy, and slower steps after it.

A model of 50 MB, its momentum is as large. One step takes about 50 ms on a quiet core; the writer
is a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import estimate, print_table
from benchmarks.models import Classifier, new_optimizer
from distrain import HookBase, Trainer
from distrain.checkpoint.store import CheckpointStore
from distrain.hooks.checkpoint import save

WIDTH, DEPTH = 1024, 12  # 12.6 M parameters


class Saves(HookBase):
    """Saves every so many steps, and notes what each step and each save took.

    Args:
        checkpoints: where to.
        period: steps from one save to the next, and before the first that counts.
        settle: called at the end of each step, such as `torch.cuda.synchronize`.
    """

    order = 80

    def __init__(
        self,
        checkpoints: CheckpointStore,
        *,
        period: int,
        settle: Callable[[], object] = lambda: None,
    ) -> None:
        self._checkpoints, self._period, self._settle = checkpoints, period, settle
        self.stalls_ms: list[float] = []
        self.usual_ms: list[float] = []
        self.while_writing_ms: list[float] = []
        self.written_s: list[float] = []
        self._is_writing = False

    def before_step(self) -> None:
        self._begin = time.perf_counter()

    def after_step(self) -> None:
        self._settle()
        now = time.perf_counter()
        done = self.trainer.iter_done
        if done == 1:
            self._checkpoints.reserve(self.trainer.state_dict())
        if done < self._period:  # warm up
            return
        step_ms = (now - self._begin) * 1e3
        (self.while_writing_ms if self._is_writing else self.usual_ms).append(step_ms)
        if self._is_writing and self._checkpoints.poll():
            self._is_writing = False
            self.written_s.append(now - self._saved)
        if done % self._period == 0:
            save(self.trainer, self._checkpoints)
            self._saved = time.perf_counter()
            self.stalls_ms.append((self._saved - now) * 1e3)
            self._is_writing = True

    def after_train(self) -> None:
        self._checkpoints.close()


def plain_copies_ms(
    trainer: Trainer, *, rounds: int, settle: Callable[[], object] = lambda: None
) -> list[float]:
    """Return what it takes to copy model and optimizer to the host: no save can be quicker."""
    state = [p.detach() for p in trainer.model.parameters()]
    state += [buffer for of in trainer.optimizer.state.values() for buffer in of.values()]
    on_gpu = trainer.device.type == "cuda"
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=on_gpu).zero_() for t in state]
    taken_ms = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for copy, tensor in zip(copies, state, strict=True):
            copy.copy_(tensor, non_blocking=True)
        settle()
        taken_ms.append((time.perf_counter() - begin) * 1e3)
    return taken_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--saves", type=int, default=15)
    parser.add_argument("--period", type=int, default=40, help="steps from one save to the next")
    options = parser.parse_args()
    torch.set_num_threads(1)
    layers = itertools.chain.from_iterable(
        (nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(DEPTH)
    )
    model = Classifier(*layers)
    batch = torch.randn(32, WIDTH), torch.randint(WIDTH, (32,))
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # /tmp may be memory
        hook = Saves(CheckpointStore(folder, keep_last=2), period=options.period)
        trainer = Trainer(model, new_optimizer(model), [batch], hooks=[hook])
        trainer.train(0, options.period * (options.saves + 1) - 1)
        size_mb = largest_mb(Path(folder))
    copies_ms = plain_copies_ms(trainer, rounds=len(hook.stalls_ms))
    print_saves(f"A checkpoint of {size_mb:.0f} MB while training", hook, copies_ms, target_ms=15)


def largest_mb(folder: Path) -> float:
    """Return the size of the largest checkpoint in a folder."""
    files = [[f for f in path.rglob("*") if f.is_file()] for path in folder.iterdir()]
    return max(sum(file.stat().st_size for file in of_one) for of_one in files) / 1e6


def print_saves(
    title: str, hook: Saves, copies_ms: list[float], *, target_ms: float | None = None
) -> None:
    """Print what the saves took, beside what plain copies of the same tensors did."""
    stall, usual = estimate(hook.stalls_ms), estimate(hook.usual_ms)
    writing, copying = estimate(hook.while_writing_ms), estimate(copies_ms)
    ratio = writing.median / usual.median
    written_ms = "longer than from save to save"
    if hook.written_s:
        written_ms = f"{estimate(s * 1e3 for s in hook.written_s):.0f}"
    is_quick = f"<= {target_ms}: {_yes(stall.median <= target_ms)}" if target_ms else ""
    print_table(
        f"{title} ({len(hook.stalls_ms)} saves; 95 %)",
        ["", "ms", "target"],
        [
            ["training waits for a save", f"{stall:.1f}", is_quick],
            ["a plain copy of the same tensors", f"{copying:.1f}", ""],
            ["the longest such wait", f"{max(hook.stalls_ms):.1f}", ""],
            ["a usual step", f"{usual:.1f}", ""],
            [
                f"a step during the write ({len(hook.while_writing_ms)} of them)",
                f"{writing:.1f}",
                f"<= 1.05 of the usual: {ratio:.3f}, {_yes(ratio <= 1.05)}",
            ],
            ["from save to disk", written_ms, ""],
        ],
    )


def _yes(is_met: bool) -> str:
    return "yes" if is_met else "NO"


if __name__ == "__main__":
    main()

"""Checkpoints while training."""

from __future__ import annotations

from typing import Any, Literal

from distrain.checkpoint import CheckpointStore
from distrain.distributed import gather_to_main, random_states
from distrain.errors import ConfigError
from distrain.heartbeat import Phase
from distrain.hook import HookBase
from distrain.hooks.early_stopping import Improvement
from distrain.loop import TrainerBase
from distrain.progressbar import waiting


class PeriodicCheckpointer(HookBase):
    """Saves every so many iterations, and at the end: finished or stopped, but not failed.

    Args:
        period: in iterations; None saves at the end only.
        checkpoints: where to.
    """

    order = 80

    def __init__(self, period: int | None = None, *, checkpoints: CheckpointStore) -> None:
        if period is not None and period < 1:
            raise ConfigError(f"period={period}; it is at least 1 iteration, or null")
        self._period = period
        self._checkpoints = checkpoints

    def after_step(self) -> None:
        """Save if it is time; the last iteration's turn comes in `after_train`."""
        done, is_main = self.trainer.iter_done, self.trainer.where.is_main
        if self._period and done % self._period == 0 and done != self.trainer.max_iter:
            save(self.trainer, self._checkpoints)
        elif done == self.trainer.start_iter + 1 and (is_main or self.trainer.is_sharded):
            state = self.trainer.state_dict()
            if is_main:
                self._checkpoints.reserve(state)

    def after_train(self) -> None:
        """Save where training ended, and wait until it is on the disk."""
        with waiting("saving the last checkpoint"):
            if self.trainer.error is None and self.trainer.iter_done > self.trainer.start_iter:
                save(self.trainer, self._checkpoints)
            if self.trainer.where.is_main:
                self._checkpoints.close()


class BestCheckpointer(HookBase):
    """Saves whenever a metric is better than ever before, and keeps the best checkpoint.

    Args:
        metric: the scalar's name, such as "eval/accuracy"; equal on all ranks.
        mode: "max" if larger is better, "min" if smaller is.
        min_delta: how much better counts as better.
        checkpoints: where to.
    """

    order = 79  # its state is part of what it saves, and of what PeriodicCheckpointer saves

    def __init__(
        self,
        metric: str,
        *,
        mode: Literal["max", "min"] = "max",
        min_delta: float = 0.0,
        checkpoints: CheckpointStore,
    ) -> None:
        self._improvement = Improvement(metric, mode=mode, min_delta=min_delta)
        self._checkpoints = checkpoints

    def after_step(self) -> None:
        """Save if the metric was put in this iteration and is the best so far."""
        value = self.trainer.storage.put_now(self._improvement.metric)
        if value is not None and self._improvement.update(value):
            save(self.trainer, self._checkpoints)
            if self.trainer.where.is_main:
                self._checkpoints.mark_best(self.trainer.iter_done, value)

    def after_train(self) -> None:
        """Look at the metric of the final evaluation."""
        if self.trainer.error is None and self.trainer.iter_done > self.trainer.start_iter:
            self.after_step()

    def state_dict(self) -> dict[str, Any]:
        """Return the best value."""
        return {"best": self._improvement.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the best value back."""
        self._improvement.best = state["best"]


def save(trainer: TrainerBase, checkpoints: CheckpointStore) -> None:
    """Save all that a resumed run needs. A collective; training waits for the copy only.

    Args:
        trainer: whose state it is.
        checkpoints: where to; only rank 0's is used.
    """
    with trainer.pulse.phase(Phase.SAVING):
        trainer.reduction.drain(trainer.storage.iter)
        random = gather_to_main(random_states())
        if random is None and not trainer.is_sharded:
            return
        state = trainer.state_dict()
        if random is None:
            return
        state["rng"] = {"ranks": random}
        checkpoints.save(trainer.iter_done, state, world_size=trainer.where.world_size)

"""Checkpoints while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from distrain.checkpoint.store import CheckpointStore
from distrain.distributed.collectives import gather_to_main
from distrain.distributed.rng import random_states
from distrain.errors import ConfigError
from distrain.heartbeat import Phase
from distrain.hooks.evaluation import is_finished
from distrain.hooks.metric import MetricHook
from distrain.progress import waiting
from distrain.trainer.hook import HookBase
from distrain.trainer.loop import TrainerBase


class PeriodicCheckpointer(HookBase):
    """Saves every so many iterations, and at the end: finished or stopped, but not failed.

    Args:
        period: in iterations; None saves at the end only.
        checkpoints: where to.
    """

    order = 80
    only_closes = True

    def __init__(self, period: int | None = None, *, checkpoints: CheckpointStore) -> None:
        if period is not None and period < 1:
            raise ConfigError(f"period={period}; it is at least 1 iteration, or null")
        self._period = period
        self._checkpoints = checkpoints

    def before_train(self) -> None:
        """Check that the state can be saved, as far as there is one."""
        self._rehearse(self._checkpoints.check)

    def after_step(self) -> None:
        """Save if it is time; the last iteration's turn comes in `after_train`."""
        done = self.trainer.iter_done
        if done == self.trainer.start_iter + 1:  # now the optimizer has its state, too
            self._rehearse(self._checkpoints.reserve)
        if self._period and done % self._period == 0 and done != self.trainer.max_iter:
            save_in_loop(self.trainer, self._checkpoints)

    def _rehearse(self, take: Callable[[Mapping[str, Any]], object]) -> None:
        """Hand rank 0's state to `take`. A collective where the model is sharded."""
        is_main = self.trainer.where.is_main
        if is_main or self.trainer.is_sharded:
            state = self.trainer.state_dict()
            if is_main:
                take(state)

    def after_last_step(self) -> None:
        """Save what is trained, if the end does more than to close things: that may fail."""
        more = [
            hook
            for hook in self.trainer.hooks.values()
            if type(hook).after_train is not HookBase.after_train and not hook.only_closes
        ]
        if more and is_finished(self.trainer) and self.trainer.iter_done > self.trainer.start_iter:
            save(self.trainer, self._checkpoints, is_end_left=True)

    def after_train(self) -> None:
        """Save where training ended, and wait until it is on the disk."""
        has_more = self.trainer.iter_done > self.trainer.start_iter or self.trainer.ends_only
        with waiting("saving the last checkpoint"):
            if self.trainer.error is None and has_more:
                save(self.trainer, self._checkpoints)
            if self.trainer.where.is_main:
                self._checkpoints.close()


class BestCheckpointer(MetricHook):
    """Saves whenever a metric is better than ever before, and keeps the best checkpoint.

    There may be several, each for a metric of its own: a checkpoint that is the best of two is
    saved once.

    Args:
        metric: the scalar's name, such as "eval/accuracy"; equal on all ranks.
        mode: "max" if larger is better, "min" if smaller is.
        min_delta: how much better counts as better.
        checkpoints: where to.
    """

    order = 79  # its state is part of what it saves, and of what PeriodicCheckpointer saves
    only_closes = True

    def __init__(
        self,
        metric: str,
        *,
        mode: Literal["max", "min"] = "max",
        min_delta: float = 0.0,
        checkpoints: CheckpointStore,
    ) -> None:
        super().__init__(metric, mode=mode, min_delta=min_delta)
        self._checkpoints = checkpoints
        self._unsaved: float | None = None  # the best value, while no checkpoint is marked with it

    def before_train(self) -> None:
        """Check the metric, and that no other keeps the best checkpoint of it."""
        for name, hook in self.trainer.hooks.items():
            if not isinstance(hook, BestCheckpointer) or hook is self:
                continue
            if hook.metric == self.metric:
                raise ConfigError(
                    f"hooks.{name}.metric={self.metric}: expected a metric that no other "
                    "BestCheckpointer has; remove one of the two"
                )
        super().before_train()

    def after_step(self) -> None:
        """Save if the metric of this hook, or of another of its kind, is the best so far."""
        self._save_best(save_in_loop)

    def after_train(self) -> None:
        """Look at the metric of the final evaluation."""
        if self.trainer.error is None:
            self._save_best(save)
        super().after_train()

    def _save_best(self, save: Callable[..., bool]) -> None:
        hooks = [h for h in self.trainer.hooks.values() if isinstance(h, BestCheckpointer)]
        marks = {h.metric: h._unsaved for h in hooks if h._look() and h._unsaved is not None}
        if not marks:
            return
        unsaved = [(hook, hook._unsaved) for hook in hooks]
        for hook in hooks:  # the saved state: nothing is left to save
            hook._unsaved = None
        if not save(self.trainer, self._checkpoints, best=marks):
            for hook, value in unsaved:
                hook._unsaved = value

    def _look(self) -> bool:
        """Take the metric's value, if there is a new one; whether a best one is not saved."""
        value = self.new_value()
        if value is not None and self.is_best(value):
            self._unsaved = value
        return self._unsaved is not None

    def state_dict(self) -> dict[str, Any]:
        """Return the best value."""
        return {"best": self.best, "unsaved": self._unsaved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the best value back."""
        self.best, self._unsaved = state["best"], state["unsaved"]


def save_in_loop(
    trainer: TrainerBase, checkpoints: CheckpointStore, *, best: Mapping[str, float] | None = None
) -> bool:
    """Do what `save` does, unless training ends with this iteration: then its end saves.

    Returns:
        Whether it was saved.
    """
    trainer.reduction.drain(trainer.storage.iter)
    return not trainer.reduction.stop and save(trainer, checkpoints, best=best)


def save(
    trainer: TrainerBase,
    checkpoints: CheckpointStore,
    *,
    best: Mapping[str, float] | None = None,
    is_end_left: bool = False,
) -> bool:
    """Save all that a resumed run needs. A collective; training waits for the copy only.

    Args:
        trainer: whose state it is.
        checkpoints: where to; only rank 0's is used.
        best: see `CheckpointStore.save`.
        is_end_left: see `CheckpointStore.save`; the state has what `TrainerBase.train` needs to do
            the end only.

    Returns:
        True.
    """
    with trainer.pulse.phase(Phase.SAVING):
        trainer.reduction.drain(trainer.storage.iter)
        random = gather_to_main(random_states())
        if random is None and not trainer.is_sharded:
            return True
        state = trainer.state_dict()
        if random is None:
            return True
        state["rng"] = {"ranks": random}
        if is_end_left:
            state["end"] = {"stop": trainer.reduction.stop}
        checkpoints.save(
            trainer.iter_done,
            state,
            world_size=trainer.where.world_size,
            best=best,
            is_end_left=is_end_left,
        )
    return True

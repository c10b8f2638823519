"""Checkpoints during training: periodic, and of the best metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from distrain.checkpoint.portable import from_portable, to_portable
from distrain.checkpoint.store import CheckpointStore
from distrain.checks import wrong
from distrain.distributed.collectives import gather_to_main
from distrain.distributed.rng import random_states
from distrain.heartbeat import Phase
from distrain.hooks.metric import MetricHook
from distrain.hooks.periodic import Period, checked_period, in_iterations, is_due, is_finished
from distrain.progress import waiting
from distrain.trainer.hook import HookBase
from distrain.trainer.loop import TrainerBase


class PeriodicCheckpointer(HookBase):
    """Saves every `period` iterations, and at the end of a run that did not fail.

    Args:
        period: in iterations, or text in epochs, as "1 epoch"; None saves at the end only.
        checkpoints: destination.
    """

    order = 80
    only_closes = True

    def __init__(self, period: Period | None = None, *, checkpoints: CheckpointStore) -> None:
        self._period = None if period is None else checked_period(period)
        self._checkpoints = checkpoints

    def before_train(self) -> None:
        if self._period is not None:
            self._period = in_iterations(self, self._period)
        self._rehearse(self._checkpoints.check)

    def after_step(self) -> None:
        if self.trainer.iter_done == self.trainer.start_iter + 1:
            # from now on the optimizer has its state
            self._rehearse(self._checkpoints.reserve)
        if is_due(self.trainer, self._period) and not _stops_here(self.trainer):
            save(self.trainer, self._checkpoints)

    def _rehearse(self, take: Callable[[Mapping[str, Any]], object]) -> None:
        """Pass the state to a check, so that a state that cannot be saved is an early error."""
        state = _state(self.trainer)
        if state is not None:
            take(state)

    def after_last_step(self) -> None:
        # An `after_train` that does more than close things may fail: save the trained state before.
        more = [
            hook
            for hook in self.trainer.hooks.values()
            if type(hook).after_train is not HookBase.after_train and not hook.only_closes
        ]
        if more and is_finished(self.trainer) and self.trainer.iter_done > self.trainer.start_iter:
            save(self.trainer, self._checkpoints, is_end_left=True)

    def after_train(self) -> None:
        has_more = self.trainer.iter_done > self.trainer.start_iter or self.trainer.ends_only
        with waiting("saving the last checkpoint"):
            if self.trainer.error is None and has_more:
                save(self.trainer, self._checkpoints)
            if self.trainer.where.is_main:
                self._checkpoints.close()


class BestCheckpointer(MetricHook):
    """Saves whenever a metric is the best so far, and keeps that checkpoint.

    Several hooks may each have a metric; an iteration that is the best of two is saved once.

    Args:
        metric: the scalar's name, such as "eval/accuracy"; equal on all ranks.
        mode: "max" if larger is better, "min" if smaller is.
        min_delta: smallest improvement that counts.
        checkpoints: destination.
    """

    order = 79  # its state is part of the checkpoints, its own and PeriodicCheckpointer's

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
        self._unsaved: float | None = None  # best value, until a checkpoint is marked with it

    def before_train(self) -> None:
        for other in self._all():
            if other is not self and other.metric == self.metric:
                expected = "a metric that no other BestCheckpointer has; remove one of the two"
                raise wrong(other.key, self.metric, expected)
        super().before_train()

    def after_step(self) -> None:
        marks = self._marks()
        if marks and not _stops_here(self.trainer):
            self._save(marks)

    def after_train(self) -> None:
        # the final evaluation is over
        if self.trainer.error is None and (marks := self._marks()):
            self._save(marks)
        super().after_train()

    def _all(self) -> list[BestCheckpointer]:
        return [h for h in self.trainer.hooks.values() if isinstance(h, BestCheckpointer)]

    def _marks(self) -> dict[str, float]:
        """Best values of all these hooks that no checkpoint has yet, by metric."""
        for hook in self._all():
            if hook.has_improved():
                hook._unsaved = hook.best
        return {h.metric: h._unsaved for h in self._all() if h._unsaved is not None}

    def _save(self, marks: Mapping[str, float]) -> None:
        for hook in self._all():  # in the saved state nothing is left to save
            hook._unsaved = None
        save(self.trainer, self._checkpoints, best=marks)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "unsaved": self._unsaved}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self._unsaved = state["best"], state["unsaved"]


def save(
    trainer: TrainerBase,
    checkpoints: CheckpointStore,
    *,
    best: Mapping[str, float] | None = None,
    is_end_left: bool = False,
) -> None:
    """Save all that a resumed run needs. A collective; training waits for the copy only.

    Args:
        trainer: owner of the state.
        checkpoints: destination; only rank 0's is used.
        best: see `CheckpointStore.save`.
        is_end_left: see `CheckpointStore.save`; `TrainerBase.train` then does the end only.
    """
    with trainer.pulse.phase(Phase.SAVING):
        trainer.reduction.drain(trainer.storage.iter)
        position = to_portable(trainer.data_state())
        ranks = gather_to_main({"random": random_states(), "position": position})
        state = _state(trainer)
        if state is None:
            return
        assert ranks is not None
        state["rng"] = {"ranks": [of_rank["random"] for of_rank in ranks]}
        if trainer.data_state() is not None:
            state["stream"]["ranks"] = [from_portable(of_rank["position"]) for of_rank in ranks]
        if is_end_left:
            state["end"] = {"stop": trainer.reduction.stop}
        checkpoints.save(
            trainer.iter_done,
            state,
            world_size=trainer.where.world_size,
            best=best,
            is_end_left=is_end_left,
        )


def _state(trainer: TrainerBase) -> dict[str, Any] | None:
    """Return the state on rank 0, None elsewhere. A collective where the model is sharded."""
    is_main = trainer.where.is_main
    state = trainer.state_dict() if is_main or trainer.is_sharded else None
    return state if is_main else None


def _stops_here(trainer: TrainerBase) -> bool:
    """Whether training ends with this iteration: then its end saves."""
    trainer.reduction.drain(trainer.storage.iter)
    return bool(trainer.reduction.stop)

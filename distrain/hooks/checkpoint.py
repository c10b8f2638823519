"""Checkpoints during training: periodic, and of the best metric."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

from typing_extensions import override

from distrain.checkpoint.portable import from_portable, to_portable
from distrain.checkpoint.store import CheckpointStore, Score
from distrain.checks import whole, wrong
from distrain.distributed.collectives import gather_to_all, gather_to_main
from distrain.distributed.rng import random_states
from distrain.durations import seconds
from distrain.errors import ConfigError
from distrain.heartbeat import Phase
from distrain.hooks.metric import MetricHook
from distrain.hooks.periodic import Period, checked_period, in_iterations, is_due, is_finished
from distrain.progress import waiting
from distrain.trainer.hook import HookBase
from distrain.trainer.loop import TrainerBase

_MAX_SHOWN = 4  # values in a message


class PeriodicCheckpointer(HookBase):
    """Saves every `period` iterations, and at the end of a run that did not fail.

    With `every`, also when so much time has passed since the last of these saves, by the clock of
    rank 0: the ranks agree on the iteration at the end of a window.

    Args:
        period: in iterations, or text in epochs, as "1 epoch"; None saves at the end only.
        every: a duration, as "15m" or in seconds; None saves by iterations only.
        checkpoints: destination.
    """

    order = 80
    only_closes = True

    def __init__(
        self,
        period: Period | None = None,
        *,
        every: str | float | None = None,
        checkpoints: CheckpointStore,
    ) -> None:
        self._period = None if period is None else checked_period(period)
        self._every_s = None if every is None else seconds("every", every)
        self._checkpoints = _checked(checkpoints)

    def before_train(self) -> None:
        if self._period is not None:
            self._period = in_iterations(self, self._period)
        self._saved_s = time.monotonic()
        _check_unused(self.trainer, self._checkpoints)
        self._rehearse(self._checkpoints.check)

    def after_step(self) -> None:
        if self.trainer.iter_done == self.trainer.start_iter + 1:
            # from now on the optimizer has its state
            self._rehearse(self._checkpoints.reserve)
        is_late = self._every_s is not None and self._is_late(self._every_s)
        if (is_late or is_due(self.trainer, self._period)) and not _stops_here(self.trainer):
            self._save()

    def _is_late(self, every_s: float) -> bool:
        """Whether the ranks have agreed that the time has passed; request it on rank 0."""
        reduction = self.trainer.reduction
        if self.trainer.where.is_main and time.monotonic() - self._saved_s >= every_s:
            reduction.save_request = True
        return reduction.save_agreed

    def _save(self) -> None:
        reduction = self.trainer.reduction
        reduction.save_request = False  # before the save reduces the next window
        save(self.trainer, self._checkpoints)
        reduction.save_agreed = False
        self._saved_s = time.monotonic()

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
        keep: number of checkpoints with the best values that are kept; `min_delta` does not count
            for more than the best one.
        checkpoints: destination.
    """

    order = 79  # its state is part of the checkpoints, its own and PeriodicCheckpointer's

    def __init__(
        self,
        metric: str,
        *,
        mode: Literal["max", "min"] = "max",
        min_delta: float = 0.0,
        keep: int = 1,
        checkpoints: CheckpointStore,
    ) -> None:
        super().__init__(metric, mode=mode, min_delta=min_delta)
        self._larger_is_better = mode == "max"
        self._keep = whole("keep", keep, least=1)
        self._top: list[tuple[float, int]] = []  # values and iterations, best first; if keep > 1
        self._unsaved_score: float | None = None
        self._checkpoints = _checked(checkpoints)
        self._unsaved: float | None = None  # best value, until a checkpoint is marked with it

    def before_train(self) -> None:
        for other in self._all():
            if other is not self and other.metric == self.metric:
                expected = "a metric that no other BestCheckpointer has; remove one of the two"
                raise wrong(other.key, self.metric, expected)
        _check_unused(self.trainer, self._checkpoints)
        super().before_train()

    def after_step(self) -> None:
        self._look()
        if self._is_unsaved() and not _stops_here(self.trainer):
            self._save()

    def after_train(self) -> None:
        # the final evaluation is over
        if self.trainer.error is None:
            self._look()
            if self._is_unsaved():
                self._save()
        super().after_train()

    @override
    def has_improved(self) -> bool | None:
        improved, trainer = super().has_improved(), self.trainer
        if improved is None or trainer.reported_now(self.metric) is not None:
            return improved
        # ranks that decide by their own values would save in different iterations, and hang
        values = map(repr, gather_to_all(trainer.metric_now(self.metric)))
        different = [*dict.fromkeys(values)]
        if len(different) > 1:
            found = ", ".join(different[:_MAX_SHOWN])
            expected = f"a metric that is equal on all ranks, as eval/loss; the ranks put {found}"
            raise wrong(self.key, self.metric, expected)
        return improved

    def _all(self) -> list[BestCheckpointer]:
        return [h for h in self.trainer.hooks.values() if isinstance(h, BestCheckpointer)]

    def _look(self) -> None:
        """Look at the metrics of this iteration, for all these hooks."""
        for hook in self._all():
            improved = hook.has_improved()
            if improved:
                hook._unsaved = hook.best
            if improved is not None and hook._keep > 1:
                hook._enter(hook.trainer.metric_now(hook.metric), hook.trainer.iter_done)

    def _enter(self, value: float | None, iteration: int) -> None:
        """Enter a value among the best ones, if it is one of them."""
        if value is None or not math.isfinite(value):
            return
        sign = -1.0 if self._larger_is_better else 1.0
        top = [entry for entry in self._top if entry[1] != iteration]
        top = sorted([*top, (value, iteration)], key=lambda entry: (sign * entry[0], entry[1]))
        self._top = top[: self._keep]
        if (value, iteration) in self._top:
            self._unsaved_score = value

    def _is_unsaved(self) -> bool:
        """Whether no checkpoint has the best values of all these hooks yet."""
        return any(h._unsaved is not None or h._unsaved_score is not None for h in self._all())

    def _save(self) -> None:
        hooks = self._all()
        best = {h.metric: h._unsaved for h in hooks if h._unsaved is not None}
        scores = {
            h.metric: Score(h._unsaved_score, h._larger_is_better, h._keep)
            for h in hooks
            if h._unsaved_score is not None
        }
        for hook in hooks:  # in the saved state nothing is left to save
            hook._unsaved = hook._unsaved_score = None
        save(self.trainer, self._checkpoints, best=best, scores=scores)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"best": self.best, "unsaved": self._unsaved}
        if self._keep > 1:
            state |= {"top": self._top, "unsaved_score": self._unsaved_score}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self._unsaved = state["best"], state["unsaved"]
        if self._keep > 1:
            self._top = [(value, iteration) for value, iteration in state.get("top", ())]
            self._unsaved_score = state.get("unsaved_score")


def save(
    trainer: TrainerBase,
    checkpoints: CheckpointStore,
    *,
    best: Mapping[str, float] | None = None,
    scores: Mapping[str, Score] | None = None,
    is_end_left: bool = False,
) -> None:
    """Save all that a resumed run needs. A collective; training waits for the copy only.

    Args:
        trainer: owner of the state.
        checkpoints: destination; only rank 0's is used.
        best: see `CheckpointStore.save`.
        scores: see `CheckpointStore.save`.
        is_end_left: see `CheckpointStore.save`; `TrainerBase.train` then does the end only.
    """
    with trainer.pulse.phase(Phase.SAVING):
        trainer.reduction.drain(trainer.storage.iter)
        position = trainer.data_state()
        own = {"random": random_states(), "position": to_portable(position)}
        ranks = gather_to_main(own)
        state = _state(trainer)
        if state is None:
            return
        assert ranks is not None
        state["rng"] = {"ranks": [of_rank["random"] for of_rank in ranks]}
        if position is not None:
            state["stream"]["ranks"] = [from_portable(of_rank["position"]) for of_rank in ranks]
        if is_end_left:
            state["end"] = {"stop": trainer.reduction.stop}
        checkpoints.save(
            trainer.iter_done,
            state,
            world_size=trainer.where.world_size,
            best=best,
            scores=scores,
            is_end_left=is_end_left,
        )


def _checked(checkpoints: CheckpointStore) -> CheckpointStore:
    if not isinstance(checkpoints, CheckpointStore):
        expected = (
            'a CheckpointStore, shared by the hooks: distrain.CheckpointStore("RUN/checkpoints")'
        )
        raise wrong("checkpoints", checkpoints, expected)
    return checkpoints


def _check_unused(trainer: TrainerBase, checkpoints: CheckpointStore) -> None:
    """Refuse a training from 0 in a folder that has checkpoints of such a training.

    Valid ones stay as they are, so the states of the same iterations would not be saved, and a
    resumed run would continue from the older ones. Only a script that does not resume comes here.
    """
    newest = checkpoints.newest_own() if trainer.where.is_main and not trainer.start_iter else None
    if newest:  # that of iteration 0 may be the one it resumed from
        raise ConfigError(
            f"checkpoints={checkpoints.folder}: expected a folder without checkpoints for a "
            f"training from iteration 0; it holds iteration {newest}: continue with "
            "trainer.train(distrain.resume(trainer, checkpoints), ...), or give another folder"
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

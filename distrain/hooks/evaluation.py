"""Evaluation while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from distrain.data.loader import EvalLoader
from distrain.errors import ConfigError
from distrain.events.reduction import STOP_REQUESTED
from distrain.hooks.ema import EMA
from distrain.trainer.evaluate import evaluate
from distrain.trainer.hook import HookBase
from distrain.trainer.loop import TrainerBase
from distrain.trainer.module_state import kept_generators, no_trace
from distrain.trainer.trainer import Trainer


class EvalHook(HookBase):
    """Evaluates every so many iterations and at the end, and puts the results as `eval/<name>`.

    With an `EMA` hook the averaged weights are evaluated too, as `eval_ema/<name>` where the hook
    is called ema, or instead of the model's, as that hook says.

    Args:
        period: in iterations; None evaluates at the end only.
        eval_loader: this rank's share of a data set, given to `distrain.trainer.evaluate.evaluate`;
            without it and without a function nothing is evaluated.
        function: instead of it, returns metrics by name, equal on all ranks; all ranks call it.
        prefix: of the scalars' names.
    """

    order = 60
    trainer: Trainer

    def __init__(
        self,
        period: int | None = None,
        *,
        eval_loader: EvalLoader | None = None,
        function: Callable[[], Mapping[str, float]] | None = None,
        prefix: str = "eval",
    ) -> None:
        if period is not None and period < 1:
            raise ConfigError(f"period={period}; it is at least 1 iteration, or null")
        if eval_loader is not None and function is not None:
            raise ConfigError("eval_loader and function are both given; keep one")
        self._period = period
        self._eval_loader = eval_loader
        self._function = function
        self._prefix = prefix
        self._last_done = -1
        self._found: tuple[str, ...] | None = None
        self.only_closes = eval_loader is None and function is None

    def before_train(self) -> None:
        """Check that at most one average takes the place of the weights; evaluate one batch.

        A mistake in the model's `metrics` is found before anything is trained.
        """
        self.is_idle = self._period is None
        hooks = self.trainer.hooks.items()
        instead = [n for n, h in hooks if isinstance(h, EMA) and h.evaluate == "instead"]
        if len(instead) > 1:
            raise ConfigError(f"hooks.{instead[1]}.evaluate=instead: hooks.{instead[0]} has it too")
        if self._eval_loader is not None:
            self._found = self._dry_run(max_batches=1)

    def names(self, *, all_batches: bool = False) -> tuple[str, ...] | None:
        """Return the full names of the metrics, after `before_train`; None if they are not known.

        Args:
            all_batches: evaluate the whole data set, as some batches only may have a metric. A
                collective.
        """
        if all_batches and self._eval_loader is not None:
            self._found = self._dry_run()
        if self._found is None:
            return None
        return tuple(f"{prefix}/{name}" for prefix in self.prefixes() for name in self._found)

    def prefixes(self) -> list[str]:
        """Return how the names of this hook's metrics begin."""
        hooks = self.trainer.hooks.items()
        averages = [n for n, h in hooks if isinstance(h, EMA) and h.evaluate == "beside"]
        return [self._prefix, *(f"{self._prefix}_{name}" for name in averages)]

    def _dry_run(self, max_batches: int | None = None) -> tuple[str, ...]:
        """Evaluate without a trace; return the names over all ranks. A collective."""
        with no_trace(self.trainer.module):
            return tuple(self._evaluated(max_batches))

    def after_step(self) -> None:
        """Evaluate if it is time; the last iteration's turn comes in `after_train`."""
        done = self.trainer.iter_done
        if self._period and done % self._period == 0 and done != self.trainer.max_iter:
            self._evaluate()

    def after_train(self) -> None:
        """Evaluate the finished model; not if training only pauses here, or failed."""
        if is_finished(self.trainer) and self._last_done != self.trainer.iter_done:
            self._evaluate()

    def state_dict(self) -> dict[str, Any]:
        """Return which iteration was evaluated last."""
        return {"last_done": self._last_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._last_done = state["last_done"]

    def _evaluate(self) -> None:
        if self._function is None and self._eval_loader is None:
            return
        hooks = self.trainer.hooks.items()
        averages = {name: h for name, h in hooks if isinstance(h, EMA) and h.is_ready}
        if all(average.evaluate == "beside" for average in averages.values()):
            self._put(self._prefix)
        for name, average in averages.items():
            with average.applied():
                is_beside = average.evaluate == "beside"
                self._put(f"{self._prefix}_{name}" if is_beside else self._prefix)
        self._last_done = self.trainer.iter_done

    def _put(self, prefix: str) -> None:
        """Evaluate the weights that the model has now, as training calls the model."""
        trainer = self.trainer
        if self._function is not None:
            with kept_generators():
                results: Mapping[str, float] = self._function()
        else:
            results = self._evaluated()
        trainer.report_metrics({f"{prefix}/{name}": value for name, value in results.items()})

    def _evaluated(self, max_batches: int | None = None) -> dict[str, float]:
        trainer = self.trainer
        assert self._eval_loader is not None
        with trainer.gathered():
            return evaluate(
                trainer.module,
                self._eval_loader,
                device=trainer.device,
                precision=trainer.precision,
                channels_last=trainer.channels_last,
                max_batches=max_batches,
            )


def is_finished(trainer: TrainerBase) -> bool:
    """Whether training has come to its end, rather than pauses here or has failed."""
    is_last = trainer.iter_done == trainer.max_iter
    ended = is_last or trainer.reduction.stop not in (0, STOP_REQUESTED)
    return trainer.error is None and ended

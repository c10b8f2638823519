"""Evaluation while training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from distrain.data import EvalLoader
from distrain.errors import ConfigError
from distrain.evaluation import evaluate
from distrain.hook import HookBase
from distrain.reduction import STOP_REQUESTED
from distrain.trainer import Trainer


class EvalHook(HookBase):
    """Evaluates every so many iterations and at the end, and puts the results as `eval/<name>`.

    Args:
        period: in iterations; None evaluates at the end only.
        eval_loader: this rank's share of a data set, given to `distrain.evaluation.evaluate`;
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

    def after_step(self) -> None:
        """Evaluate if it is time; the last iteration's turn comes in `after_train`."""
        done = self.trainer.iter_done
        if self._period and done % self._period == 0 and done != self.trainer.max_iter:
            self._evaluate()

    def after_train(self) -> None:
        """Evaluate the finished model; not if training only pauses here, or failed."""
        trainer = self.trainer
        finished = trainer.iter_done == trainer.max_iter or (
            trainer.reduction.stop not in (0, STOP_REQUESTED)
        )
        if trainer.error is None and finished and self._last_done != trainer.iter_done:
            self._evaluate()

    def _evaluate(self) -> None:
        trainer = self.trainer
        if self._function is not None:
            results = self._function()
        elif self._eval_loader is not None:
            with trainer.gathered():
                results = evaluate(trainer.module, self._eval_loader, device=trainer.device)
        else:
            return
        self._last_done = trainer.iter_done
        for name, value in results.items():
            trainer.storage.put_scalar(
                f"{self._prefix}/{name}", value, smoothing_hint=False, reduce="local"
            )

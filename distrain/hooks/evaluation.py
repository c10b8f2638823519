"""EvalHook: evaluation during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from distrain.checks import wrong
from distrain.data.loader import EvalLoader
from distrain.errors import ConfigError
from distrain.hooks.ema import EMA
from distrain.hooks.periodic import Period, PeriodicHook
from distrain.trainer.evaluate import evaluate
from distrain.trainer.module_state import kept_generators, no_trace
from distrain.trainer.trainer import Trainer


class EvalHook(PeriodicHook):
    """Evaluates every `period` iterations and at the end, and puts the results as `eval/<name>`.

    Averaged weights of an `EMA` hook are evaluated too, as `eval_<hook>/<name>`, or instead of the
    model's, see `EMA.evaluate`.

    Args:
        period: in iterations, or text as "1 epoch"; None evaluates at the end only.
        eval_loader: this rank's part of a data set, for `distrain.trainer.evaluate.evaluate`.
        function: instead of `eval_loader`; returns metrics by name, equal on all ranks, and is
            called on all ranks. With neither nothing is evaluated.
        prefix: of the scalars' names.
    """

    order = 60
    trainer: Trainer

    def __init__(
        self,
        period: Period | None = None,
        *,
        eval_loader: EvalLoader | None = None,
        function: Callable[[], Mapping[str, float]] | None = None,
        prefix: str = "eval",
    ) -> None:
        super().__init__(period)
        if eval_loader is not None and function is not None:
            raise ConfigError("eval_loader and function: expected one of the two; remove the other")
        self._eval_loader = eval_loader
        self._function = function
        self._prefix = prefix
        self._metrics: Sequence[str] = ()
        self.only_closes = eval_loader is None and function is None

    def before_train(self) -> None:
        super().before_train()
        self.is_idle = self._period is None or self.only_closes
        instead = [name for name, ema in self._averages().items() if ema.evaluate == "instead"]
        if len(instead) > 1:
            expected = f"one such hook, and hooks.{instead[0]} is one; set beside"
            raise wrong(f"hooks.{instead[1]}.evaluate", "instead", expected)
        if self._eval_loader is not None:
            # a mistake in the model's `metrics` is an error before anything is trained
            self._metrics = self._dry_run(max_batches=1)

    def has(self, metric: str) -> bool:
        """Whether this evaluation has, or may have, a metric of that full name.

        A collective if the first batch lacks it.
        """
        if self._eval_loader is None or metric in self.names():
            return True
        self._metrics = self._dry_run()  # a metric may be in some batches only
        return metric in self.names()

    def names(self) -> list[str]:
        """Return the full names of the metrics that are known after `before_train`."""
        return [f"{prefix}/{name}" for prefix in self.prefixes() for name in self._metrics]

    def prefixes(self) -> list[str]:
        """Return the prefixes of the metrics' names: the model's, then those of averages."""
        of_averages = (self._prefix_of(name, ema) for name, ema in self._averages().items())
        return [*dict.fromkeys([self._prefix, *of_averages])]

    def run(self) -> None:
        averages = {name: ema for name, ema in self._averages().items() if ema.is_ready}
        if all(ema.evaluate == "beside" for ema in averages.values()):
            self._put(self._prefix)
        for name, ema in averages.items():
            with ema.applied():
                self._put(self._prefix_of(name, ema))

    def _averages(self) -> dict[str, EMA]:
        return {name: h for name, h in self.trainer.hooks.items() if isinstance(h, EMA)}

    def _prefix_of(self, name: str, ema: EMA) -> str:
        return f"{self._prefix}_{name}" if ema.evaluate == "beside" else self._prefix

    def _put(self, prefix: str) -> None:
        """Evaluate the current weights and report the metrics."""
        if self._function is not None:
            with kept_generators():
                results: Mapping[str, float] = self._function()
        else:
            results = self._evaluate()
        self.trainer.report_metrics({f"{prefix}/{name}": value for name, value in results.items()})

    def _dry_run(self, max_batches: int | None = None) -> Sequence[str]:
        """Evaluate without a trace; return the names over all ranks. A collective."""
        with no_trace(self.trainer.module):
            return [*self._evaluate(max_batches)]

    def _evaluate(self, max_batches: int | None = None) -> dict[str, float]:
        trainer = self.trainer
        assert self._eval_loader is not None
        with trainer.strategy.whole_parameters(trainer.module):
            return evaluate(
                trainer.module,
                self._eval_loader,
                device=trainer.device,
                precision=trainer.precision,
                channels_last=trainer.channels_last,
                max_batches=max_batches,
            )

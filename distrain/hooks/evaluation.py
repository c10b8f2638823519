"""EvalHook: evaluation during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from distrain.checks import did_you_mean, whole, wrong
from distrain.data.loader import EvalLoader
from distrain.errors import ConfigError
from distrain.hooks.periodic import Period, PeriodicHook, in_iterations
from distrain.hooks.weight_average import WeightAverage
from distrain.trainer.evaluate import check_eval_sets, evaluate
from distrain.trainer.hook import HookBase
from distrain.trainer.module_state import kept_generators, no_trace
from distrain.trainer.set_metrics import check_metrics
from distrain.trainer.trainer import Trainer

_ONLY = ""  # name of the set where there is one without a name


class EvalHook(HookBase):
    """Evaluates every `period` iterations and at the end, and puts the results as `eval/<name>`.

    Of several sets, by name, they are `eval/<set>/<name>`. Averaged weights of an `EMA` hook are
    evaluated too, as `eval_<hook>/<name>`, or instead of the model's, see `EMA.evaluate`.

    Args:
        period: in iterations, or text as "1 epoch", or that of each set by its name; None evaluates
            at the end only.
        eval_loader: this rank's part of a data set, for `distrain.trainer.evaluate.evaluate`; or of
            several sets, by name.
        metrics: over all samples of a set, by name: torchmetrics objects, or functions; see
            `distrain.trainer.set_metrics.SetMetrics`.
        function: instead of `eval_loader`; returns metrics by name, equal on all ranks, and is
            called on all ranks. With neither nothing is evaluated.
        prefix: of the scalars' names.
        at_start: also evaluate before the first iteration of a new run, as of iteration 0.
        limit: only the first samples of each set, as many over all ranks; None takes all.
    """

    order = 60
    trainer: Trainer

    def __init__(
        self,
        period: Period | Mapping[str, Period | None] | None = None,
        *,
        eval_loader: EvalLoader | Mapping[str, EvalLoader] | None = None,
        metrics: Mapping[str, Any] | None = None,
        function: Callable[[], Mapping[str, float]] | None = None,
        prefix: str = "eval",
        at_start: bool = False,
        limit: int | None = None,
    ) -> None:
        if eval_loader is not None and function is not None:
            raise ConfigError("eval_loader and function: expected one of the two; remove the other")
        sets = eval_loader if isinstance(eval_loader, Mapping) else {_ONLY: eval_loader}
        self._loaders = {
            name: loader if limit is None else _limited(loader, limit)
            for name, loader in sets.items()
            if loader is not None
        }
        check_metrics(metrics or {})
        if metrics and not self._loaders:
            raise ConfigError("metrics: expected an eval_loader of a data set for them")
        self._metrics = metrics
        self._function = function
        self._prefix = prefix
        self._at_start = at_start
        self._names: dict[str, list[str]] = {name: [] for name in self._loaders}
        self.only_closes = not self._loaders and function is None
        periods = _periods(period, [*self._loaders] or [_ONLY])
        self._turns = {name: _Turn(p, partial(self._run, name)) for name, p in periods.items()}

    def before_train(self) -> None:
        for turn in self._turns.values():
            turn.start(self)
        self.is_idle = self.only_closes or all(turn.is_idle for turn in self._turns.values())
        instead = [name for name, ema in self._averages().items() if ema.evaluate == "instead"]
        if len(instead) > 1:
            expected = f"one such hook, and hooks.{instead[0]} is one already; 'beside' adds values"
            raise wrong(f"hooks.{instead[1]}.evaluate", "instead", expected)
        if self._loaders:  # a loop of the user's own may have no module
            check_eval_sets(self.trainer.module, self._loaders)
        for name in self._loaders:
            # a mistake in the model's `metrics` is an error before anything is trained
            self._names[name] = self._dry_run(name, max_batches=1)
        trainer = self.trainer
        if self._at_start and trainer.start_iter == 0 and not trainer.ends_only:
            for turn in self._turns.values() if not self.only_closes else ():
                turn.run()

    def after_step(self) -> None:
        for turn in self._turns.values():
            turn.after_step()

    def after_train(self) -> None:
        for turn in self._turns.values():
            turn.after_train()

    def state_dict(self) -> dict[str, Any]:
        return {"turns": {name: turn.state_dict() for name, turn in self._turns.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, turn in self._turns.items():
            if name in state["turns"]:  # a set may be new
                turn.load_state_dict(state["turns"][name])

    def has(self, metric: str) -> bool:
        """Whether this evaluation has, or may have, a metric of that full name.

        A collective if the first batch lacks it.
        """
        if not self._loaders or metric in self.names():
            return True
        for name in self._loaders:  # a metric may be in some batches only
            self._names[name] = self._dry_run(name)
        return metric in self.names()

    def names(self) -> list[str]:
        """Return the full names of the metrics that are known after `before_train`."""
        return [
            _joined(prefix, of_set, name)
            for prefix in self.prefixes()
            for of_set, names in self._names.items()
            for name in names
        ]

    def prefixes(self) -> list[str]:
        """Return the prefixes of the metrics' names: the model's, then those of averages."""
        of_averages = (self._prefix_of(name, ema) for name, ema in self._averages().items())
        return [*dict.fromkeys([self._prefix, *of_averages])]

    def _run(self, of_set: str) -> None:
        """Evaluate a set with the current weights and with averages of them."""
        averages = {name: ema for name, ema in self._averages().items() if ema.is_ready}
        if all(ema.evaluate == "beside" for ema in averages.values()):
            self._put(self._prefix, of_set)
        for name, ema in averages.items():
            with ema.applied():
                self._put(self._prefix_of(name, ema), of_set)

    def _averages(self) -> dict[str, WeightAverage]:
        return {name: h for name, h in self.trainer.hooks.items() if isinstance(h, WeightAverage)}

    def _prefix_of(self, name: str, ema: WeightAverage) -> str:
        return f"{self._prefix}_{name}" if ema.evaluate == "beside" else self._prefix

    def _put(self, prefix: str, of_set: str) -> None:
        """Evaluate the current weights and report the metrics."""
        if self._function is not None:
            with kept_generators():
                results: Mapping[str, float] = self._function()
        else:
            results = self._evaluate(of_set)
        self.trainer.report_metrics(
            {_joined(prefix, of_set, name): value for name, value in results.items()}
        )

    def _dry_run(self, of_set: str, max_batches: int | None = None) -> list[str]:
        """Evaluate without a trace; return the names over all ranks. A collective."""
        with no_trace(self.trainer.module):
            return [*self._evaluate(of_set, max_batches)]

    def _evaluate(self, of_set: str, max_batches: int | None = None) -> dict[str, float]:
        trainer = self.trainer
        with trainer.strategy.whole_parameters(trainer.module):
            return evaluate(
                trainer.module,
                self._loaders[of_set],
                device=trainer.device,
                precision=trainer.precision,
                channels_last=trainer.channels_last,
                metrics=self._metrics,
                max_batches=max_batches,
            )


class _Turn(PeriodicHook):
    """Periodic evaluation of one set, called by the EvalHook."""

    def __init__(self, period: Period | None, work: Callable[[], None]) -> None:
        super().__init__(period)
        self._work = work

    def start(self, hook: EvalHook) -> None:
        """Prepare for training, as a part of a hook."""
        self.trainer, self.only_closes = hook.trainer, hook.only_closes
        if self._period is not None:
            self._period = in_iterations(hook, self._period)
        self.is_idle = self._period is None

    def run(self) -> None:
        self._work()


def _periods(period: Any, sets: list[str]) -> dict[str, Period | None]:
    """Return the period of each set.

    Raises:
        ConfigError: a period is that of an unknown set.
    """
    if not isinstance(period, Mapping):
        return dict.fromkeys(sets, period)
    for name in period:
        if name not in sets:
            hint = did_you_mean(str(name), filter(None, sets))
            raise ConfigError(f"period.{name}: no such set in data.eval; {hint}")
    return {name: period.get(name) for name in sets}


def _limited(loader: EvalLoader, limit: int) -> EvalLoader:
    whole("limit", limit, least=1)
    if not isinstance(loader, EvalLoader):
        raise wrong("limit", limit, "null, as eval_loader is no distrain.data.EvalLoader")
    return loader.limited(limit)


def _joined(prefix: str, of_set: str, name: str) -> str:
    return f"{prefix}/{of_set}/{name}" if of_set else f"{prefix}/{name}"

"""Metrics over a whole data set: torchmetrics objects, and functions over all predictions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from distrain.checks import name_part, wrong
from distrain.distributed.collectives import broadcast_from_main, gather_to_main
from distrain.distributed.ranks import topology
from distrain.errors import ConfigError, add_note
from distrain.log import logger
from distrain.trainer.metric_states import is_object, merge_states, parts_of, unsynced
from distrain.trainer.predictions import (
    Predictions,
    arguments_of,
    join_ranks,
    named,
    taken_by,
)

KEY = "eval.metrics"


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Raise ConfigError unless each is a torchmetrics object with states, or a function."""
    if not isinstance(metrics, Mapping):
        raise wrong("metrics", metrics, "a mapping of metrics by name")
    for name, metric in metrics.items():
        name_part(f"{KEY}.{name}", name)
        if is_object(metric):
            if not any(part.metric_state for part in parts_of(metric)):
                raise ConfigError(
                    f"{KEY}.{name}: {type(metric).__name__} has no states to gather over ranks; "
                    "register them by its add_state"
                )
        elif isinstance(metric, type) or not callable(metric):
            kind = metric.__name__ if isinstance(metric, type) else type(metric).__name__
            raise ConfigError(
                f"{KEY}.{name}: {kind} cannot be gathered over ranks; expected an object of a "
                "class derived from torchmetrics.Metric, or a function over all predictions"
            )


class SetMetrics:
    """Metrics of what a model's `predict` returns for all samples of all ranks.

    A torchmetrics object is updated per batch on each rank; rank 0 merges the states of all ranks
    and computes the value. A function is called on rank 0, with the predictions of all samples in
    their order. All ranks get the values.

    Of predictions by name, each metric gets those that its `update`, or the function, takes. Those
    in a tuple are passed by position; anything else is the only argument.

    Args:
        metrics: by name; see `check_metrics`.
        model: has the method `predict`, called like forward.
        device: of the model.
        rank: number of this rank's part of the data set.
    """

    def __init__(
        self, metrics: Mapping[str, Any], model: nn.Module, *, device: torch.device, rank: int
    ) -> None:
        predict = getattr(model, "predict", None)
        if predict is None:
            raise ConfigError(
                f"{KEY}: {type(model).__name__} has no method predict; write one that takes a "
                "batch as forward does and returns what the metrics take, as (preds, target)"
            )
        self.predict: Callable[..., Any] = predict
        self._objects = {name: metric for name, metric in metrics.items() if is_object(metric)}
        self._functions = {n: metric for n, metric in metrics.items() if n not in self._objects}
        self._rank = rank
        self._predictions = Predictions()
        self._by_position = False
        for metric in self._objects.values():
            metric.to(device)
        self.close()

    def close(self) -> None:
        """Drop the states of the torchmetrics objects."""
        for metric in self._objects.values():
            metric.reset()

    def add(self, found: Any, length: int) -> None:
        """Add what `predict` returned for a batch of `length` samples.

        Raises:
            ConfigError: it lacks an argument of a metric.
        """
        for name, metric in self._objects.items():
            positional, keywords = arguments_of(f"{KEY}.{name}", metric.update, found)
            metric.update(*positional, **keywords)
        if self._functions:
            self._by_position = not isinstance(found, Mapping)
            self._predictions.add(self._needed(found), length)

    def _needed(self, found: Any) -> dict[str, Any]:
        """Return the predictions that any of the functions takes, by name."""
        if not isinstance(found, Mapping):
            return named(found)
        needed: dict[str, Any] = {}
        for name, function in self._functions.items():
            needed |= taken_by(f"{KEY}.{name}", function, found)
        return needed

    def values(self, *, is_part: bool) -> dict[str, float]:
        """Return the metrics over all ranks, on all ranks. A collective.

        Args:
            is_part: the samples are not the whole set: a metric that fails on them is left out,
                with a warning.

        Raises:
            ConfigError: a value is not a number, or a state cannot be gathered.
        """
        if topology().world_size == 1:
            return self._computed([self._state()], is_part=is_part)
        try:
            gathered = gather_to_main({**self._state(), "states": self._states()})
        except TypeError as error:
            raise ConfigError(f"{KEY}: cannot be gathered over ranks: {error}") from error
        failure: Exception | None = None
        values: dict[str, float] = {}
        if gathered is not None:
            try:
                values = self._merged(gathered, is_part=is_part)
            except Exception as error:  # raised when the other ranks, which wait, know of it
                failure = error
        is_config = isinstance(failure, ConfigError)
        text = None if failure is None else str(failure) or repr(failure)
        values, text, is_config = broadcast_from_main([values, text, is_config])
        if failure is None and text is not None:
            failure = (ConfigError if is_config else RuntimeError)(text)
        if failure is not None:
            raise failure
        return values

    def _state(self) -> dict[str, Any]:
        return {
            "rank": self._rank,
            "predictions": self._predictions.joined(),
            "by_position": self._by_position,
        }

    def _states(self) -> dict[str, Any]:
        return {
            name: [part.metric_state if part.update_called else None for part in parts_of(metric)]
            for name, metric in self._objects.items()
        }

    def _merged(self, gathered: list[Any], *, is_part: bool) -> dict[str, float]:
        """Return the values over all ranks, as rank 0."""
        # ranks with the same part of the data, as of tensor parallelism, count once
        of_parts = {rank["rank"]: rank for rank in gathered}
        ranks = [of_parts[number] for number in sorted(of_parts)]
        for name, metric in self._objects.items():
            merge_states(metric, [rank["states"][name] for rank in ranks])
        return self._computed(ranks, is_part=is_part)

    def _computed(self, ranks: list[Any], *, is_part: bool) -> dict[str, float]:
        """Return the values of the objects' states and of all predictions."""
        predictions = join_ranks([rank["predictions"] for rank in ranks])
        by_position = any(rank["by_position"] for rank in ranks)
        found = tuple(predictions.values()) if by_position else predictions
        values: dict[str, float] = {}
        for name in (*self._objects, *self._functions):
            try:
                if name in self._objects:
                    result = _value_of(self._objects[name], is_part=is_part)
                else:
                    function = self._functions[name]
                    positional, keywords = arguments_of(f"{KEY}.{name}", function, found)
                    result = function(*positional, **keywords)
            except Exception as error:
                if not is_part:
                    add_note(error, f"while computing {KEY}.{name}")
                    raise
                logger.warning("%s.%s: failed on a part of the samples: %s", KEY, name, error)
            else:
                values |= _numbers(name, result)
        return values


def _value_of(metric: Any, *, is_part: bool) -> Any:
    """Return a torchmetrics object's value of the states that it has."""
    with unsynced(metric), warnings.catch_warnings():
        if is_part:  # a class may be missing in one batch
            warnings.simplefilter("ignore")
        # rank 0 may have had no batch
        warnings.filterwarnings("ignore", "The ``compute`` method", UserWarning)
        return metric.compute()


def _numbers(name: str, value: Any) -> dict[str, float]:
    """Return a metric's values by name: of a mapping, those that are one number."""
    if not isinstance(value, Mapping):
        number = _number(value)
        if number is None:
            shape = [*value.shape] if hasattr(value, "shape") else type(value).__name__
            raise ConfigError(
                f"{KEY}.{name}: its value is {shape}; expected one number, or a dict of numbers "
                "by name"
            )
        return {name: number}
    numbers = {f"{name}/{key}": _number(part) for key, part in value.items()}
    left_out = [key for key, number in numbers.items() if number is None]
    if left_out:
        logger.debug("%s: not one number, left out: %s", KEY, ", ".join(left_out))
    return {key: number for key, number in numbers.items() if number is not None}


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # torch raises RuntimeError for several elements
        return None

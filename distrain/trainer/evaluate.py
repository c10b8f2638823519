"""Evaluate a model over a data set: each sample once, on any number of ranks."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distrain import heartbeat, progress
from distrain.data.batch import batch_length, to_channels_last, to_device
from distrain.data.loader import EvalLoader
from distrain.distributed.collectives import gather_to_all
from distrain.distributed.ranks import topology
from distrain.errors import ConfigError
from distrain.events.storage import EventStorage, entered_storage
from distrain.heartbeat import Phase
from distrain.trainer.loss import Loss, WeightedLosses
from distrain.trainer.model_call import call, check_name, takes_whole_batch, total_loss
from distrain.trainer.module_state import buffers_of_rank_0, eval_mode, kept_generators
from distrain.trainer.numerics import Precision, autocast_dtype
from distrain.trainer.set_metrics import KEY, SetMetrics

_SUM_OF_MEANS = "\0loss"  # marks losses by name with weights, whose sum is known at the end


def evaluate(
    model: nn.Module,
    loader: EvalLoader | Collection[Any],
    *,
    device: torch.device,
    precision: Precision = "fp32",
    channels_last: bool = False,
    metrics: Mapping[str, Any] | None = None,
    max_batches: int | None = None,
) -> dict[str, float]:
    """Return the metrics of a model over all samples of all ranks. A collective.

    Means over samples are those of the model's method `metrics`, called like its forward, which
    returns (B,) values by name, one per sample, or a `Loss`, a sum over other elements; without
    that method they are its losses, weighted by their weights or the size of the batch. A metric in
    some batches only is divided by the samples of those. Metrics over the whole set, as an AUROC,
    are given by `metrics`.

    The model is in eval mode meanwhile, on all ranks with the buffers of rank 0, which are those
    of a checkpoint. Modes, buffers and random generators are restored afterwards.

    Args:
        model: not wrapped: ranks may have different numbers of batches.
        loader: this rank's part of the data set, in batches.
        device: of the model.
        precision: "bf16" and "fp16" evaluate under autocast.
        channels_last: convert images to that memory format.
        metrics: torchmetrics objects and functions by name, see `set_metrics.SetMetrics`.
        max_batches: largest number per rank; None takes all.

    Raises:
        ConfigError: a metric is not one value per sample, or a name is there twice.
    """
    rank = loader.rank if isinstance(loader, EvalLoader) else topology().rank
    of_set = SetMetrics(metrics, model, device=device, rank=rank) if metrics else None
    with evaluating(model), contextlib.closing(of_set) if of_set else contextlib.nullcontext():
        totals = _Totals(model)
        num = len(loader) if max_batches is None else min(len(loader), max_batches)
        if isinstance(loader, EvalLoader):  # loads no batch ahead of the last one
            batches = loader.batches(max_batches)
        else:
            batches = itertools.islice(loader, max_batches)
        dtype = autocast_dtype(precision)
        counted = progress.counted(batches, "evaluation", total=num)
        for batch, length in on_device(counted, device=device, channels_last=channels_last):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                totals.add(batch, length)
                found = None if of_set is None else call(of_set.predict, batch, whole=totals.whole)
            if of_set is not None:
                of_set.add(found, length)
        means = totals.means()
        values = {} if of_set is None else of_set.values(is_part=max_batches is not None)
    for name in means.keys() & values.keys():
        raise ConfigError(f"{KEY}.{name}: the model has a metric of that name; rename one")
    return means | values


def check_eval_sets(model: nn.Module, names: Collection[str]) -> None:
    """Let a model with a method `check_eval_sets` refuse the evaluation sets of these names."""
    check = getattr(model, "check_eval_sets", None)
    if callable(check):
        check(names)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, rank 0's buffers, no gradients; all is restored afterwards. A collective.

    Scalars that the model puts are dropped; images and histograms are kept.
    """
    storage = entered_storage()
    with (
        heartbeat.current().phase(Phase.EVALUATION),
        EventStorage() if storage is None else storage.scalars_dropped(),
        kept_generators(),
        buffers_of_rank_0(model),
        eval_mode(model),
        torch.no_grad(),
    ):
        yield


def on_device(
    batches: Iterable[Any], *, device: torch.device, channels_last: bool
) -> Iterator[tuple[Any, int]]:
    """Yield each batch on the device with its number of samples, with a heartbeat per batch."""
    for batch in batches:
        heartbeat.current().beat(Phase.EVALUATION)
        length = batch_length(batch)
        batch = to_device(batch, device)
        yield (to_channels_last(batch) if channels_last else batch), length


def _means(ranks: list[Any]) -> dict[str, float]:
    """Return the mean of each metric from (count, sum) by name of each rank.

    Losses with weights are summed after their means.
    """
    means = {}
    for name in sorted({name for rank in ranks for name in rank}):
        count, total = map(sum, zip(*(rank[name] for rank in ranks if name in rank), strict=True))
        if count:
            means[name] = total / count
    if _SUM_OF_MEANS in means:
        del means[_SUM_OF_MEANS]
        means = {"loss": sum(means.values()), **means}
    return means


class _Totals:
    """Sums of a model's metrics over batches, and their numbers of samples or weights."""

    def __init__(self, model: nn.Module) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, Tensor | int] = {}
        self._model = model
        self._metrics = getattr(model, "metrics", None)
        self.whole = takes_whole_batch(model)

    def add(self, batch: Any, length: int) -> None:
        """Call the model with a batch of `length` samples."""
        if self._metrics is None:
            losses = total_loss(call(self._model, batch, whole=self.whole))
            sums = _sums_of_losses(losses, length)
        else:
            sums = _sums(call(self._metrics, batch, whole=self.whole), length)
        for name, (value, count) in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + count

    def means(self) -> dict[str, float]:
        """Return the means over all samples of all ranks. A collective."""
        return _means(
            gather_to_all(
                {name: (float(self.counts[name]), float(sum_)) for name, sum_ in self.sums.items()}
            )
        )


_Sums = dict[str, tuple[Tensor, Tensor | int]]


def _sums_of_losses(losses: dict[str, Tensor], length: int) -> _Sums:
    """Return the sum and the weight of each loss of a batch."""
    if not isinstance(losses, WeightedLosses):
        return {name: (loss.double() * length, length) for name, loss in losses.items()}
    sums: _Sums = {n: (loss.double() * length, length) for n, loss in losses.plain.items()}
    sums |= {n: (total.double(), losses.weights[n]) for n, total in losses.totals.items()}
    if "loss" not in sums:
        sums[_SUM_OF_MEANS] = (losses["loss"].new_zeros(()), 1)
    return sums


def _sums(values: Any, length: int) -> _Sums:
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"metrics() returned {type(values).__name__}: expected a dict with one value per "
            f"sample, [{length}], by name"
        )
    for name in values:
        check_name("metrics()", name)
    weighted = WeightedLosses({n: v for n, v in values.items() if isinstance(v, Loss)})
    for name, value in values.items():
        if name in weighted.totals:
            continue
        if not isinstance(value, Tensor) or value.shape != (length,):
            shape = [*value.shape] if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(
                f"metric {name!r} is {shape}: expected one value per sample, [{length}]; return "
                "the values before the mean over the batch"
            )
    sums: _Sums = {
        name: (value.double().sum(), length)
        for name, value in values.items()
        if name not in weighted.totals
    }
    return sums | {n: (total.double(), weighted.weights[n]) for n, total in weighted.totals.items()}

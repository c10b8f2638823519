"""PreciseBN: recompute BatchNorm's running statistics for the current weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distrain.checks import whole
from distrain.data.loader import Loader
from distrain.distributed.sync_batchnorm import channel_moments, merged_moments
from distrain.errors import ConfigError
from distrain.heartbeat import Phase
from distrain.hooks.periodic import Period, PeriodicHook
from distrain.hooks.weight_average import WeightAverage
from distrain.progress import counted
from distrain.trainer.module_state import no_trace
from distrain.trainer.trainer import Seekable, Trainer


class PreciseBN(PeriodicHook):
    """Sets BatchNorm's running statistics to those of all values in the next batches.

    In training they are a moving average over weights that have changed since. Here the model
    runs, in training mode and without gradients, over the batches of the next iterations of all
    ranks, and each BatchNorm gets the mean and the unbiased variance of all its inputs (Wu &
    Johnson 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3). All ranks get the
    same bits, and to rounding the statistics that one process would get from all batches.

    Nothing else changes: weights, other buffers, random generators and the position in the data
    stay; scalars that the model puts are dropped. Layers in eval mode (frozen ones) are skipped.
    The averages of `SWA` and `ScheduleFree` get statistics of their own, in as many forwards again.

    Args:
        num_iters: number of iterations whose batches are used.
        period: in iterations, or text as "1 epoch"; also at the end of training. None: at the end
            only. With the period of the evaluation, each evaluation sees the new statistics.
    """

    order = 56  # before evaluation
    trainer: Trainer

    def __init__(self, num_iters: int = 100, *, period: Period | None = None) -> None:
        super().__init__(period)
        self._num_iters = whole("num_iters", num_iters, least=1)

    def before_train(self) -> None:
        super().before_train()
        data = self.trainer.data
        if not isinstance(data, Seekable) or (isinstance(data, Loader) and not data.is_seekable):
            kind = type(data).__name__
            raise ConfigError(
                f"PreciseBN: expected data that can be loaded from any iteration, got {kind}; "
                "take TrainLoader"
            )

    def run(self) -> None:
        trainer = self.trainer
        layers = [
            part
            for part in trainer.module.modules()
            if isinstance(part, _BatchNorm) and part.training and part.running_mean is not None
        ]
        if not layers:
            return
        self._set_statistics(layers)
        for hook in trainer.hooks.values():
            if isinstance(hook, WeightAverage) and hook.has_statistics and hook.is_ready:
                with hook.applied():
                    self._set_statistics(layers)
                    hook.keep_statistics()

    def _set_statistics(self, layers: list[_BatchNorm]) -> None:
        trainer = self.trainer
        with trainer.pulse.phase(Phase.EVALUATION), torch.no_grad():
            # gathered weights are given back: those of an average would not be seen
            with trainer.strategy.whole_parameters(trainer.module), no_trace(trainer.module):
                moments = self._moments(layers)
            for layer, (count, mean, squares) in zip(layers, moments, strict=True):
                if count > 1:
                    assert layer.running_mean is not None
                    assert layer.running_var is not None
                    layer.running_mean.copy_(mean)
                    layer.running_var.copy_(squares / (count - 1))

    def _moments(self, layers: list[_BatchNorm]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return count, mean and squares of each layer's inputs; see `merged_moments`."""
        trainer = self.trainer
        seen: list[list[Tensor]] = [
            [torch.zeros(1 + 2 * layer.num_features, dtype=torch.float64, device=trainer.device)]
            for layer in layers
        ]
        handles = [
            layer.register_forward_pre_hook(partial(_append_moments, rows))
            for layer, rows in zip(layers, seen, strict=True)
        ]
        num = self._num_iters * trainer.accumulation
        try:
            for batch in counted(self._batches(num), "statistics of BatchNorm", total=num):
                trainer.pulse.beat(Phase.EVALUATION)
                trainer.forward(batch)
        finally:
            for handle in handles:
                handle.remove()
        local = [
            torch.cat([n[None], m, s]) for n, m, s in map(merged_moments, map(torch.stack, seen))
        ]
        packed = torch.cat(local)  # one gather for all layers
        rows = packed.new_empty(trainer.where.world_size, len(packed))
        if trainer.where.world_size > 1:
            dist.all_gather([*rows.unbind()], packed)
        else:
            rows[0] = packed
        return [merged_moments(part) for part in rows.split_with_sizes([*map(len, local)], dim=1)]

    def _batches(self, num: int) -> Iterator[Any]:
        data = self.trainer.data
        assert isinstance(data, Seekable)
        batches = data.batches(self.trainer.iter_done)
        try:
            yield from itertools.islice(batches, num)
        finally:
            if hasattr(batches, "close"):
                batches.close()  # ends its loader processes


def _append_moments(rows: list[Tensor], layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    x = inputs[0]
    rows.append(channel_moments(x if x.dtype is torch.float64 else x.float()))

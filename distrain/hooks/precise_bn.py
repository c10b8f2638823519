"""The running statistics of BatchNorm, computed anew for the weights as they are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distrain.distributed.sync_batchnorm import channel_moments, merged_moments
from distrain.errors import ConfigError
from distrain.heartbeat import Phase
from distrain.hooks.evaluation import is_finished
from distrain.progress import counted
from distrain.trainer.hook import HookBase
from distrain.trainer.module_state import no_trace
from distrain.trainer.trainer import Seekable, Trainer


class PreciseBN(HookBase):
    """Sets BatchNorm's running statistics to those of all values in the next batches.

    While training they are a moving average over weights that have changed since. Here the model
    runs, in training mode and without gradients, over the batches of the next iterations of all
    ranks, and each BatchNorm gets the mean of all that came into it and their variance, with
    division by their number less one (Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm",
    arXiv:2105.07576, section 3). All ranks get the same bits, and to rounding what one process
    would get from all batches.

    Nothing else changes: weights, the other buffers, random generators and the position in the data
    are as before; what the model puts into the storage meanwhile is dropped. Layers in eval mode,
    frozen ones, are left alone.

    Args:
        num_iters: how many iterations' batches are looked at.
        period: in iterations; also at the end of training. None: at the end only. With the period
            of the evaluation, each evaluation sees the new statistics.

    Raises:
        ConfigError: a number is too small, or the trainer's data cannot start anywhere.
    """

    order = 56  # before evaluation
    trainer: Trainer

    def __init__(self, num_iters: int = 100, *, period: int | None = None) -> None:
        if num_iters < 1:
            raise ConfigError(f"num_iters={num_iters}; it is at least 1 iteration")
        if period is not None and period < 1:
            raise ConfigError(f"period={period}; it is at least 1 iteration, or null")
        self._num_iters = num_iters
        self._period = period
        self._last_done = -1

    def before_train(self) -> None:
        """Check that the data can be read beside the training."""
        if not isinstance(self.trainer.data, Seekable):
            kind = type(self.trainer.data).__name__
            raise ConfigError(
                f"PreciseBN reads batches beside the training, which a {kind} cannot give; give "
                "the trainer a TrainLoader, or data with batches(start_iter)"
            )

    def after_step(self) -> None:
        """Compute them if it is time; the last iteration's turn comes in `after_train`."""
        done = self.trainer.iter_done
        if self._period and done % self._period == 0 and done != self.trainer.max_iter:
            self._recompute()

    def after_train(self) -> None:
        """Compute them for the finished model; not if training only pauses here, or failed."""
        if is_finished(self.trainer) and self._last_done != self.trainer.iter_done:
            self._recompute()

    def state_dict(self) -> dict[str, Any]:
        """Return for which iteration they were computed last."""
        return {"last_done": self._last_done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._last_done = state["last_done"]

    def _recompute(self) -> None:
        trainer = self.trainer
        self._last_done = trainer.iter_done
        layers = [
            part
            for part in trainer.module.modules()
            if isinstance(part, _BatchNorm) and part.training and part.running_mean is not None
        ]
        if not layers:
            return
        with trainer.pulse.phase(Phase.EVALUATION), torch.no_grad():
            with no_trace(trainer.module):
                moments = self._moments(layers)
            for layer, (count, mean, squares) in zip(layers, moments, strict=True):
                if count > 1:
                    assert layer.running_mean is not None
                    assert layer.running_var is not None
                    layer.running_mean.copy_(mean)
                    layer.running_var.copy_(squares / (count - 1))

    def _moments(self, layers: list[_BatchNorm]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return count, mean and squares of what comes into each layer; see `merged_moments`."""
        trainer = self.trainer
        seen: list[list[Tensor]] = [
            [torch.zeros(1 + 2 * layer.num_features, dtype=torch.float64, device=trainer.device)]
            for layer in layers
        ]
        handles = [
            layer.register_forward_pre_hook(partial(_note, rows))
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
        own = [
            torch.cat([n[None], m, s]) for n, m, s in map(merged_moments, map(torch.stack, seen))
        ]
        sizes = [len(moments) for moments in own]
        packed = torch.cat(own)  # of all layers, so that one gather does
        rows = packed.new_empty(trainer.where.world_size, len(packed))
        if trainer.where.world_size > 1:
            dist.all_gather([*rows.unbind()], packed)
        else:
            rows[0] = packed
        return [merged_moments(part) for part in rows.split_with_sizes(sizes, dim=1)]

    def _batches(self, num: int) -> Iterator[Any]:
        data = self.trainer.data
        assert isinstance(data, Seekable)
        batches = data.batches(self.trainer.iter_done)
        try:
            yield from itertools.islice(batches, num)
        finally:
            if hasattr(batches, "close"):
                batches.close()  # loader processes end


def _note(rows: list[Tensor], layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Add the moments of what comes into a layer."""
    x = inputs[0]
    rows.append(channel_moments(x if x.dtype is torch.float64 else x.float()))

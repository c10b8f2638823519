"""A model's metrics over a data set: each sample once, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from distrain import heartbeat, progressbar
from distrain.data import EvalLoader, batch_length, to_device
from distrain.distributed import gather_to_all
from distrain.heartbeat import Phase
from distrain.losses import call, takes_whole_batch, total_loss


def evaluate(model: nn.Module, loader: EvalLoader, *, device: torch.device) -> dict[str, float]:
    """Return the mean over all samples of all ranks of each metric of the model. A collective.

    The model is put into eval mode and back. Its metrics are those of its method `metrics`, called
    like its forward, which returns (B,) values by name, one a sample; without such a method they
    are its losses, weighted by the size of the batch.

    Args:
        model: not wrapped: ranks may have different numbers of batches.
        loader: this rank's share.
        device: where the model is.

    Raises:
        ValueError: a metric is not one value a sample.
    """
    with heartbeat.of_this_process().phase(Phase.EVALUATION):
        num, sums = _share(model, loader, device)
        shares = gather_to_all((num, {name: float(total) for name, total in sums.items()}))
    num_all = sum(share for share, _ in shares)
    names = {name for _, share in shares for name in share}
    return {
        name: sum(share.get(name, 0.0) for _, share in shares) / num_all for name in sorted(names)
    }


def _share(
    model: nn.Module, loader: EvalLoader, device: torch.device
) -> tuple[int, dict[str, Tensor]]:
    """Return the number of samples of this rank and the sums of their metrics."""
    was_training = model.training
    model.eval()
    sums: dict[str, Tensor] = {}
    num = 0
    metrics = getattr(model, "metrics", None)
    whole = takes_whole_batch(model)
    pulse = heartbeat.of_this_process()
    try:
        with torch.no_grad():
            for batch in progressbar.counted(loader, "evaluation", total=len(loader)):
                pulse.beat(Phase.EVALUATION)
                length = batch_length(batch)
                batch = to_device(batch, device)
                if metrics is None:
                    losses = total_loss(call(model, batch, whole=whole))
                    totals = {name: loss.double() * length for name, loss in losses.items()}
                else:
                    totals = _sums(call(metrics, batch, whole=whole), length)
                for name, total in totals.items():
                    sums[name] = sums[name] + total if name in sums else total
                num += length
    finally:
        model.train(was_training)
    return num, sums


def _sums(values: Mapping[str, Any], length: int) -> dict[str, Tensor]:
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.shape != (length,):
            shape = [*value.shape] if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"metric {name!r} is {shape}; metrics() returns one value a sample, [{length}]"
            )
    return {name: value.double().sum() for name, value in values.items()}

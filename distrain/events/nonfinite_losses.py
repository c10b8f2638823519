"""Losses of a reduced window that are not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist

from distrain.events.history_store import Block
from distrain.events.pending import RowGroup, ScalarKind


def nonfinite_losses(block: Block, kinds: Mapping[str, ScalarKind]) -> dict[str, int]:
    """Return each loss that is not finite -> the first iteration in which it is not."""
    if np.isfinite(block.values.sum()):
        return {}
    return {
        name: int(block.iterations[~np.isfinite(values)][0])
        for name, values in zip(block.names, block.values.T, strict=True)
        if kinds[name].is_loss and not np.isfinite(values).all()
    }


def describe(
    losses: Mapping[str, int],
    groups: Sequence[RowGroup],
    group: dist.ProcessGroup | None,
    world_size: int,
) -> str:
    """Return the error: `nonfinite_losses`, the first iteration, ranks, fixes; a collective."""
    ranks = [0]
    if world_size > 1:
        flags = [
            not np.isfinite(rows.values[:, rows.names.index(name)]).all()
            for rows in groups
            for name in losses
            if name in rows.names
        ]
        mine = torch.tensor([any(flags)])
        all_ranks = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(all_ranks, mine, group=group)
        ranks = [rank for rank, is_bad in enumerate(all_ranks) if is_bad]
    return (
        f"{', '.join(losses)} not finite from iteration {min(losses.values())} on, on rank "
        f"{', '.join(map(str, ranks))} of {world_size}; no checkpoint was saved since. Lower "
        "optim.lr, clip gradients (trainer.clip_norm=1.0), check the data, or skip such updates "
        "(trainer.nonfinite=skip)"
    )

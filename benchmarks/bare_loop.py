"""The bare loop that all is compared with: it trains, and rank 0 logs its loss every 20 steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from benchmarks.models import new_optimizer


def bare_loop(model: nn.Module, folder: Path) -> Callable[[Iterable[Any]], None]:
    """Return a function that trains on some batches; rank 0 logs every 20 steps."""
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    writer = SummaryWriter(str(folder)) if is_main else None
    optimizer, step = new_optimizer(model), 0

    def train(batches: Iterable[Any]) -> None:
        nonlocal step
        for inputs, labels in batches:
            loss = model(inputs, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if writer and step % 20 == 0:
                writer.add_scalar("loss", loss.item(), step)

    return train

"""ScheduleFree: training and averaged weights of the package schedulefree's optimizers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from distrain.errors import ConfigError
from distrain.hooks.weight_average import WeightAverage
from distrain.optim.combined import CombinedOptimizer


class ScheduleFree(WeightAverage):
    """Keeps a schedule-free optimizer in train mode, and evaluates its averaged weights.

    Defazio et al. 2024, "The Road Less Scheduled", arXiv:2405.15682. The optimizer trains weights y
    and returns weights x, their average; `eval()` of the optimizer turns y into x in place and
    `train()` turns them back to rounding. This hook restores y exactly, so that an evaluation
    changes no bit of training.

    `eval/...` is of x. A checkpoint holds y, with which training continues, and x in this hook's
    `average`: `--ema schedule_free` exports or evaluates it. `PreciseBN` computes the statistics of
    BatchNorm for x, too.
    """

    evaluate = "instead"
    has_statistics = True

    @override
    def before_train(self) -> None:
        if not self._optimizers:
            kind = type(next(iter(self.trainer.optimizers.values()))).__name__
            raise ConfigError(
                f"hooks.{self.trainer.name_of(self)}: expected an optimizer of the package "
                f"schedulefree, not {kind}; set optim.target=schedulefree.AdamWScheduleFree"
            )
        for optimizer in self._optimizers:
            optimizer.train()

    @property
    def _optimizers(self) -> list[Any]:
        """The schedule-free optimizers of the trainer."""
        found: list[Any] = []
        for each in self.trainer.optimizers.values():
            found += each.optimizers if isinstance(each, CombinedOptimizer) else [each]
        return [one for one in found if "train_mode" in one.param_groups[0]]

    @property
    @override
    def is_ready(self) -> bool:
        return any("z" in one.state[p] for one in self._optimizers for p in _parameters(one))

    @contextmanager
    @override
    def _swapped(self) -> Iterator[None]:
        local = self.trainer.strategy.local  # torch cannot copy lists of shards
        weights = [local(p.detach()) for one in self._optimizers for p in _parameters(one)]
        own = [weight.clone() for weight in weights]
        for optimizer in self._optimizers:
            optimizer.eval()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, own)
            for optimizer in self._optimizers:
                for group in optimizer.param_groups:
                    group["train_mode"] = True

    @override
    def _average_by_name(self) -> dict[str, Tensor]:
        if not self.is_ready:
            return {}
        with self._swapped():
            named = self.trainer.module.named_parameters(remove_duplicate=False)
            return {name: p.detach().clone() for name, p in named}


def _parameters(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]

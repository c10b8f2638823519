"""WeightAverage: base class of hooks with averaged weights to evaluate, save and export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer


class WeightAverage(HookBase, ABC):
    """An average of the weights; subclasses say which.

    Its state holds `average`, weights by the names of the parameters;
    `python -m distrain.weights RUN --ema NAME -o FILE` makes a file of it.

    Attributes:
        evaluate: "beside": `EvalHook` evaluates it in addition, as `eval_NAME/...`; "instead": the
            average only, as `eval/...`.
        has_statistics: whether a `PreciseBN` hook computes statistics of BatchNorm for it, too.
    """

    order = 54  # after the hooks that users add, before evaluation
    trainer: Trainer
    evaluate: Literal["beside", "instead"]
    has_statistics: ClassVar[bool] = False
    _statistics: dict[str, Tensor] | None = None  # running means and variances by name

    @property
    @abstractmethod
    def is_ready(self) -> bool:
        """Whether there is an average yet."""

    @abstractmethod
    def _swapped(self) -> AbstractContextManager[None]:
        """Give the parameters the averaged weights inside `with`, and their own after it."""

    @abstractmethod
    def _average_by_name(self) -> dict[str, Tensor]:
        """Return the averaged weights by the names of the parameters; none before `is_ready`."""

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the average inside `with`, and its own weights again after it."""
        buffers = _statistics(self.trainer.module) if self.has_statistics else {}
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        strategy, module = self.trainer.strategy, self.trainer.module
        with self._swapped():
            strategy.free_gathered(module)
            _copy(self._statistics or {}, buffers)
            try:
                yield
            finally:
                _copy(own, buffers)
                strategy.free_gathered(module)

    def keep_statistics(self) -> None:
        """Keep BatchNorm's statistics for the average; called inside `applied`."""
        buffers = _statistics(self.trainer.module)
        self._statistics = {name: buffer.clone() for name, buffer in buffers.items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        average = self.trainer.strategy.gathered(self._average_by_name())
        return {"average": {**average, **(self._statistics or {})}}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.has_statistics:
            self._statistics = {
                name: state["average"][name].to(buffer.device, copy=True)
                for name, buffer in _statistics(self.trainer.module).items()
                if name in state["average"]
            }


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    """Return running means and variances by their names in the model's state."""
    return {
        f"{name}.{key}".lstrip("."): getattr(part, key)
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
        for key in ("running_mean", "running_var")
    }


@torch.no_grad()
def _copy(values: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
    for name, value in values.items():
        buffers[name].copy_(value)

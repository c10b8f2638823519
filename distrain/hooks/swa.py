"""SWA: the equal average of the weights at the end of training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from distrain.checks import whole
from distrain.hooks.ema import EMA


class SWA(EMA):
    """Averages the weights after iterations `start`, `start + period`, ..., all with equal weight.

    Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization",
    arXiv:1803.05407; the average is that of torch's `AveragedModel` with `get_swa_multi_avg_fn`.
    The rate of that time is the schedule's, as of torch's `SWALR` at the end of a `SequentialLR`.

    Everything else is as with `EMA`: evaluated as `eval_swa/...`, in every checkpoint, exported by
    `--ema swa`. A `PreciseBN` hook computes the statistics of BatchNorm for the average too; they
    are in the average that is evaluated, saved and exported.

    Args:
        start: iterations before the first weights of the average, >= 1.
        period: in iterations, from one of them to the next.
        evaluate: "beside" or "instead", see `EMA`.
    """

    def __init__(
        self,
        start: int,
        *,
        period: int = 1,
        evaluate: Literal["beside", "instead"] = "beside",
    ) -> None:
        super().__init__(0.0, warmup=False, period=period, evaluate=evaluate)
        self._start_iter = whole("start", start, least=1)
        self._statistics: dict[str, Tensor] = {}  # of BatchNorm, by name, for the average

    @override
    def _is_due(self, done: int) -> bool:
        return done >= self._start_iter and (done - self._start_iter) % self._period == 0

    @override
    def _fraction(self, t: int) -> float:
        return 1.0 / (t + 1)

    @contextmanager
    @override
    def applied(self) -> Iterator[None]:
        buffers = _statistics(self.trainer.module)
        own = {name: buffer.clone() for name, buffer in buffers.items()}
        with super().applied():
            _copy(self._statistics, buffers)
            try:
                yield
            finally:
                _copy(own, buffers)

    def keep_statistics(self) -> None:
        """Keep BatchNorm's statistics for the average; called inside `applied`."""
        buffers = _statistics(self.trainer.module)
        self._statistics = {name: buffer.clone() for name, buffer in buffers.items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {**state, "average": {**state["average"], **self._statistics}}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
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

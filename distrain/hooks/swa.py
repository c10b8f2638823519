"""SWA: the equal average of the weights at the end of training."""

from __future__ import annotations

from typing import Literal

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

    has_statistics = True

    def __init__(
        self,
        start: int,
        *,
        period: int = 1,
        evaluate: Literal["beside", "instead"] = "beside",
    ) -> None:
        super().__init__(0.0, warmup=False, period=period, evaluate=evaluate)
        self._start_iter = whole("start", start, least=1)

    @override
    def _is_due(self, done: int) -> bool:
        return done >= self._start_iter and (done - self._start_iter) % self._period == 0

    @override
    def _fraction(self, t: int) -> float:
        return 1.0 / (t + 1)

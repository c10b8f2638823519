"""Learning-rate schedules: pure functions of the iteration, as torch schedulers.

All follow `lr(t) = base_lr * warmup(t) * decay(t)`, where t is the number of updates made and the
only state, so a resumed run, or one with another horizon, continues as if it had always been so.
The examples give `decay(t)` for t = 0, 1, 2, ...; see `WarmupLR` for the warm-up. Any scheduler of
torch that steps once per iteration works in their place.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer
from typing_extensions import Unpack, override

from distrain.checks import number, one_of, whole, wrong
from distrain.schedule.warmup import HorizonLR, Warmup, WarmupLR


class WarmupConstantLR(WarmupLR):
    """The base rate after the warm-up: `decay(t) = 1`."""

    @override
    def decay(self, t: int) -> float:
        return 1.0


class WarmupMultiStepLR(WarmupLR):
    """Drops at milestones: `decay(t) = gamma ** bisect_right(milestones, t)`.

    The schedule of ResNet (He et al. 2016) and of most detectors. Example: milestones [2, 4], gamma
    0.1: 1, 1, 0.1, 0.1, 0.01, ...

    Args:
        milestones: the t of the drops, ascending.
        gamma: factor of each drop, >= 0.
        optimizer, *warmup, **keywords: see `WarmupLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        gamma: float = 0.1,
        *warmup: Any,
        **keywords: Unpack[Warmup],
    ) -> None:
        if isinstance(milestones, str) or not isinstance(milestones, Sequence):
            raise wrong("milestones", milestones, "a list of iterations")
        self.milestones = [whole("milestones", each, least=0) for each in milestones]
        if self.milestones != sorted(self.milestones):
            raise wrong("milestones", self.milestones, "ascending iterations; sort the list")
        self.gamma = number("gamma", gamma)
        super().__init__(optimizer, *warmup, **keywords)

    @override
    def decay(self, t: int) -> float:
        return float(self.gamma ** bisect_right(self.milestones, t))


class WarmupCosineLR(HorizonLR):
    """Half a cosine down to a fraction of the base rate at `max_iters`.

    `decay(t) = final_factor + (1 - final_factor) * 0.5 * (1 + cos(pi * t / max_iters))`: Loshchilov
    & Hutter 2017, "SGDR", equation 5, without restarts. The cosine starts at t = 0, also under a
    warm-up, and rises again past `max_iters`. Example: max_iters 4, final_factor 0: 1, 0.853553,
    0.5, 0.146447, 0.

    Args:
        final_factor: fraction of the base rate at the end, >= 0.
        optimizer, max_iters, *warmup, **keywords: see `HorizonLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        *warmup: Any,
        final_factor: float = 0.0,
        **keywords: Unpack[Warmup],
    ) -> None:
        self.final_factor = number("final_factor", final_factor)
        super().__init__(optimizer, max_iters, *warmup, **keywords)

    @override
    def decay(self, t: int) -> float:
        cosine = 0.5 * (1.0 + math.cos(math.pi * t / self.max_iters))
        return self.final_factor + (1.0 - self.final_factor) * cosine


class WarmupCosineRestartsLR(WarmupLR):
    """Cosine cycles with warm restarts (SGDR).

    At x of a cycle, 0 <= x < 1, `decay(t) = final_factor + (1 - final_factor) * 0.5 * (1 + cos(pi *
    x))`, times `restart_factor` to the power of the number of restarts so far. Each cycle is
    `cycle_factor` times as long as the one before: Loshchilov & Hutter 2017, "SGDR", section 3. The
    first cycle starts at t = 0, also under a warm-up. Example: cycle_iters 2, cycle_factor 2,
    restart_factor 0.5: 1, 0.5, 0.5, 0.426777, 0.25, 0.073223, 0.25, ...

    Args:
        cycle_iters: length of the first cycle.
        cycle_factor: length of a cycle over that of the one before, an integer >= 1.
        restart_factor: height of a cycle over that of the one before, > 0.
        final_factor: fraction of the cycle's height at its end, >= 0.
        optimizer, **keywords: see `WarmupLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        cycle_iters: int,
        *,
        cycle_factor: int = 1,
        restart_factor: float = 1.0,
        final_factor: float = 0.0,
        **keywords: Unpack[Warmup],
    ) -> None:
        self.cycle_iters = whole("cycle_iters", cycle_iters, least=1)
        self.cycle_factor = whole("cycle_factor", cycle_factor, least=1)
        self.restart_factor = number("restart_factor", restart_factor, above=0.0)
        self.final_factor = number("final_factor", final_factor)
        super().__init__(optimizer, **keywords)

    @override
    def decay(self, t: int) -> float:
        start, length, restarts = 0, self.cycle_iters, 0
        if self.cycle_factor == 1:
            restarts, start = t // length, t // length * length
        else:  # as few cycles as log(t)
            while t >= start + length:
                start, length, restarts = start + length, length * self.cycle_factor, restarts + 1
        cosine = 0.5 * (1.0 + math.cos(math.pi * (t - start) / length))
        height = float(self.restart_factor**restarts)
        return height * (self.final_factor + (1.0 - self.final_factor) * cosine)


class WarmupLinearLR(HorizonLR):
    """A straight line: `decay(t) = 1 - (1 - final_factor) * min(t / max_iters, 1)`.

    The usual one for fine-tuning (Devlin et al. 2019, BERT, appendix A.2: to 0). Example: max_iters
    4, final_factor 0.2: 1, 0.8, 0.6, 0.4, 0.2, 0.2, ...

    Args:
        final_factor: fraction of the base rate at the end, >= 0.
        optimizer, max_iters, **keywords: see `HorizonLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        *,
        final_factor: float = 0.0,
        **keywords: Unpack[Warmup],
    ) -> None:
        self.final_factor = number("final_factor", final_factor)
        super().__init__(optimizer, max_iters, **keywords)

    @override
    def decay(self, t: int) -> float:
        return 1.0 - (1.0 - self.final_factor) * self.progress(t)


class WarmupPolynomialLR(HorizonLR):
    """A power of the remaining fraction: `decay(t) = (1 - min(t / max_iters, 1)) ** power`.

    "poly" of DeepLab (Chen et al. 2017, section 4.1), there with power 0.9. Example: max_iters 4,
    power 2: 1, 0.5625, 0.25, 0.0625, 0, 0, ...

    Args:
        power: exponent, > 0.
        optimizer, max_iters, **keywords: see `HorizonLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        *,
        power: float = 0.9,
        **keywords: Unpack[Warmup],
    ) -> None:
        self.power = number("power", power, above=0.0)
        super().__init__(optimizer, max_iters, **keywords)

    @override
    def decay(self, t: int) -> float:
        return math.pow(1.0 - self.progress(t), self.power)


class WarmupExponentialLR(HorizonLR):
    """The same factor in each iteration: `decay(t) = final_factor ** (t / max_iters)`.

    torch's `ExponentialLR` with gamma = final_factor ** (1 / max_iters), also past the end.
    Example: max_iters 4, final_factor 0.01: 1, 0.316228, 0.1, 0.0316228, 0.01, 0.00316228, ...

    Args:
        final_factor: fraction of the base rate at `max_iters`, > 0.
        optimizer, max_iters, **keywords: see `HorizonLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        *,
        final_factor: float = 0.01,
        **keywords: Unpack[Warmup],
    ) -> None:
        self.final_factor = number("final_factor", final_factor, above=0.0)
        super().__init__(optimizer, max_iters, **keywords)

    @override
    def decay(self, t: int) -> float:
        return math.pow(self.final_factor, t / self.max_iters)


class WarmupStableDecayLR(HorizonLR):
    """Warm-up, a long constant part, and a decay at the end (WSD).

    `decay(t) = 1` until `max_iters - decay_iters`; from there x = (t - that) / decay_iters, at most
    1, and `decay(t) = final_factor + (1 - final_factor) * shape(x)`, where shape is `1 - x`
    (linear), `0.5 * (1 + cos(pi * x))` (cosine) or `1 - sqrt(x)` (sqrt). Hu et al. 2024, MiniCPM,
    section 4; the three shapes are compared in Hägele et al. 2024, "Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations", where 1 - sqrt does best. A longer
    horizon only moves the decay: resume from before it. Example: max_iters 6, decay_iters 4,
    linear: 1, 1, 1, 0.75, 0.5, 0.25, 0; sqrt: 1, 1, 1, 0.5, 0.292893, 0.133975, 0.

    Args:
        decay_iters: length of the decay, 1 ... max_iters.
        decay_method: "linear", "cosine" or "sqrt".
        final_factor: fraction of the base rate at the end, >= 0.
        optimizer, max_iters, **keywords: see `HorizonLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        *,
        decay_iters: int,
        decay_method: str = "linear",
        final_factor: float = 0.0,
        **keywords: Unpack[Warmup],
    ) -> None:
        self.decay_iters = whole("decay_iters", decay_iters, least=1)
        if self.decay_iters > whole("max_iters", max_iters, least=1):
            raise wrong("decay_iters", decay_iters, f"at most max_iters={max_iters}")
        self.decay_method = one_of("decay_method", decay_method, ("cosine", "linear", "sqrt"))
        self.final_factor = number("final_factor", final_factor)
        super().__init__(optimizer, max_iters, **keywords)

    @override
    def decay(self, t: int) -> float:
        x = min(max(t - (self.max_iters - self.decay_iters), 0) / self.decay_iters, 1.0)
        if self.decay_method == "linear":
            shape = 1.0 - x
        elif self.decay_method == "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * x))
        else:
            shape = 1.0 - math.sqrt(x)
        return self.final_factor + (1.0 - self.final_factor) * shape


class OneCycleLR(WarmupLR):
    """Up to the base rate and down again: one cycle, with the base rate as its peak.

    With top = rise * max_iters - 1: from `start_factor` at 0 to 1 at top, then to `final_factor` at
    max_iters - 1, where it stays; `cosine` goes from a to b as `b + (a - b) * 0.5 * (1 + cos(pi *
    x))`, `linear` straight. Smith & Topin 2018, "Super-Convergence". The rates are those of torch's
    `OneCycleLR(max_lr=lr, total_steps=max_iters, pct_start=rise)`; momentum is left alone. Example:
    max_iters 9, rise 1/3, start_factor 0.2, final_factor 0, linear: 0.2, 0.6, 1, 5/6, 4/6, ... 0.

    Args:
        max_iters: length of the cycle.
        rise: fraction of the cycle with a rising rate, >= 0 and < 1.
        method: "cosine" or "linear".
        start_factor: fraction of the base rate at t = 0, >= 0.
        final_factor: fraction of the base rate at the end, >= 0.
        optimizer, last_epoch: see `WarmupLR`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        max_iters: int,
        *,
        rise: float = 0.3,
        method: str = "cosine",
        start_factor: float = 0.04,
        final_factor: float = 4e-6,
        last_epoch: int = -1,
    ) -> None:
        self.max_iters = whole("max_iters", max_iters, least=1)
        self.rise = number("rise", rise)
        if self.rise >= 1.0:
            raise wrong("rise", rise, "a fraction of the cycle, >= 0 and < 1")
        self.method = one_of("method", method, ("cosine", "linear"))
        self.start_factor = number("start_factor", start_factor)
        self.final_factor = number("final_factor", final_factor)
        super().__init__(optimizer, warmup_iters=0, last_epoch=last_epoch)

    @override
    def decay(self, t: int) -> float:
        top, last = self.rise * self.max_iters - 1, self.max_iters - 1
        if t < top:
            return self._between(self.start_factor, 1.0, t / top)
        if t >= last:
            return self.final_factor
        return self._between(1.0, self.final_factor, (t - max(top, 0)) / (last - max(top, 0)))

    def _between(self, start: float, end: float, x: float) -> float:
        if self.method == "linear":
            return start + (end - start) * x
        return end + (start - end) / 2.0 * (1.0 + math.cos(math.pi * x))

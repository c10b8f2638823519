"""EMA: an exponential moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from distrain.checks import number, one_of, whole, wrong
from distrain.hooks.weight_average import WeightAverage


class EMA(WeightAverage):
    """Keeps `average = decay * average + (1 - decay) * weights`, updated after each iteration.

    Polyak & Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging". The first
    update copies the weights. With `warmup`, the decay of the update after t others is at most
    `(1 + t) / (10 + t)`, so that an average of few updates does not stay near the start; example:
    decay 0.5 gives 2/11, 3/12, 4/13, 5/14, 6/15, 7/16, 8/17, 0.5, 0.5, ...

    All ranks compute the same bits. Averages of 16-bit weights are kept in float32. Buffers are not
    averaged: the average goes with the model's own.

    `EvalHook` evaluates the average too. Its state, `average` by the names of the parameters, is in
    every checkpoint; `python -m distrain.weights RUN --ema NAME -o FILE` makes a file of it.

    Args:
        decay: per iteration, in [0, 1); a longer `period` takes a power of it.
        warmup: whether the decay begins small.
        period: in iterations, from one update to the next.
        evaluate: "beside" puts the average's metrics as `eval_NAME/...`, NAME being the hook's (as
            `eval_ema/accuracy`); "instead" evaluates the average only, as `eval/...`.
    """

    def __init__(
        self,
        decay: float = 0.9999,
        *,
        warmup: bool = True,
        period: int = 1,
        evaluate: Literal["beside", "instead"] = "beside",
    ) -> None:
        if number("decay", decay) >= 1.0:
            raise wrong("decay", decay, "a number in [0, 1), such as 0.9999")
        one_of("evaluate", evaluate, ("beside", "instead"))
        self.evaluate = evaluate
        self._period = whole("period", period, least=1)
        self._decay = decay**period
        self._warmup = warmup
        self._updates = 0
        self._weights: list[Tensor] = []  # the model's parameters, each once
        self._average: list[Tensor] = []

    @property
    def is_ready(self) -> bool:
        return self._updates > 0

    @torch.no_grad()
    def after_step(self) -> None:
        if not self._is_due(self.trainer.iter_done):
            return
        if not self._updates:
            self._start()
        else:
            pairs = zip(self._weights, self._average, strict=True)
            weights = [w if w.dtype is a.dtype else w.to(a.dtype) for w, a in pairs]
            # one operation, nothing read back: torch's AveragedModel reads its counter back
            torch._foreach_lerp_(self._average, weights, self._fraction(self._updates))
        self._updates += 1

    def _is_due(self, done: int) -> bool:
        """Whether the average is updated after that many iterations."""
        return done % self._period == 0

    def _fraction(self, t: int) -> float:
        """Return the fraction of the new weights in the average, after t updates."""
        decay = min(self._decay, (1 + t) / (10 + t)) if self._warmup else self._decay
        return 1.0 - decay

    @contextmanager
    @override
    def _swapped(self) -> Iterator[None]:
        local = self.trainer.strategy.local  # torch cannot copy lists of shards
        weights, average = ([*map(local, part)] for part in (self._weights, self._average))
        with torch.no_grad():
            own = [w.clone() for w in weights]
            torch._foreach_copy_(weights, average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(weights, own)

    @override
    def _average_by_name(self) -> dict[str, Tensor]:
        index_of = {id(w): index for index, w in enumerate(self._weights)}
        names = self.trainer.module.named_parameters(remove_duplicate=False)
        return {name: self._average[index_of[id(w)]] for name, w in names if self.is_ready}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"updates": self._updates, **super().state_dict()}

    @override
    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._updates = state["updates"]
        if self.is_ready:
            self._start()
            named = self.trainer.module.named_parameters()
            for (name, _), average in zip(named, self._average, strict=True):
                average.copy_(self.trainer.strategy.part_of(state["average"][name], average))

    def _start(self) -> None:
        self._weights = [*self.trainer.module.parameters()]
        self._average = [
            w.detach().to(torch.promote_types(w.dtype, torch.float32), copy=True)
            for w in self._weights
        ]

"""Thaw: train parameters from an iteration on, or until one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

from torch import nn

from distrain.checks import did_you_mean, whole, wrong
from distrain.errors import ConfigError
from distrain.log import logger
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer


class Thaw(HookBase):
    """Trains parameters from one iteration on, and until another; in between they are updated.

    A frozen parameter has no gradient at the update: the optimizer leaves its value and its state
    alone, and clipping does not count it, as with `requires_grad=False`. Its gradient is computed,
    and reduced over ranks, all the same: DDP and the optimizer have the same parameters during the
    whole run. Nothing is saved: which are frozen depends on the iteration alone.

    Args:
        start: name pattern -> first iteration with updates, as `{"backbone.*": 1000}`; the first
            pattern that matches a parameter counts; a parameter without one trains from the start.
        end: name pattern -> first iteration without updates.
    """

    order = 15  # its `after_backward` comes before those that look at gradients
    trainer: Trainer

    def __init__(
        self, start: Mapping[str, int] | None = None, end: Mapping[str, int] | None = None
    ) -> None:
        self._start, self._end = dict(start or {}), dict(end or {})
        for key, patterns in (("start", self._start), ("end", self._end)):
            for pattern, iteration in patterns.items():
                whole(f"{key}.{pattern}", iteration, least=0)
        self._spans: list[tuple[nn.Parameter, float, float]] = []
        self._frozen: list[nn.Parameter] = []
        self._next_change: float = -1

    def before_train(self) -> None:
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in self.trainer.module.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        starts, ends = self._matched("start", names), self._matched("end", names)
        for parameter in starts.keys() | ends.keys():
            if not parameter.requires_grad:
                raise ConfigError(
                    f"hooks.{self.trainer.name_of(self)}: {names[parameter][0]} requires no "
                    "gradient: expected a parameter that does; let the model leave it trainable, "
                    "as this hook freezes it"
                )
        self._spans = [
            (p, starts.get(p, 0), ends.get(p, math.inf)) for p in names if p in starts or p in ends
        ]
        self._update()
        self.is_idle = not self._frozen and math.isinf(self._next_change)

    def after_backward(self) -> None:
        if self.trainer.iter >= self._next_change:
            before = len(self._frozen)
            self._update()
            if self.trainer.where.is_main:
                logger.info(
                    "iteration %d: %d of %d parameters are frozen, before it %d",
                    *(self.trainer.iter, len(self._frozen), len(self._spans), before),
                )
        for parameter in self._frozen:
            parameter.grad = None

    def _update(self) -> None:
        """Set the frozen parameters of this iteration, and the iteration of the next change."""
        now = self.trainer.iter
        self._frozen = [p for p, start, end in self._spans if not start <= now < end]
        changes = (at for _, *span in self._spans for at in span if at > now)
        self._next_change = min(changes, default=math.inf)

    def _matched(
        self, key: str, names: Mapping[nn.Parameter, list[str]]
    ) -> dict[nn.Parameter, int]:
        """Return the iteration of each parameter that a pattern of `start` or `end` matches."""
        found: dict[nn.Parameter, int] = {}
        patterns = self._start if key == "start" else self._end
        for pattern, iteration in patterns.items():
            hits = [p for p, own in names.items() if any(fnmatchcase(n, pattern) for n in own)]
            if not hits:
                known = [name for own in names.values() for name in own]
                expected = f"a pattern that matches a parameter; {did_you_mean(pattern, known)}"
                raise wrong(f"hooks.{self.trainer.name_of(self)}.{key}", pattern, expected)
            for parameter in hits:
                found.setdefault(parameter, iteration)
        return found

"""Histograms of weights and gradients, and the norm of all gradients."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from distrain.checks import did_you_mean
from distrain.errors import ConfigError
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer


class Histograms(HookBase):
    """Puts `grad_norm` in each iteration, and histograms in the last one of every n-th window.

    `grad_norm` is the 2-norm of all gradients together, averaged over ranks, before clipping.
    Histograms are `weights/NAME` after the update, `gradients/NAME` as the update gets them before
    clipping, and `gradient_norms`, of the 2-norms of all parameters' gradients. All are counted on
    the device; they are read back when the window is written, and no other step reads anything.
    Gradients that are sparse are not looked at.

    Args:
        windows: n, in windows of `trainer.window` iterations.
        match: name pattern of parameters, or several, whose histograms are put.
        weights: whether those of weights are.
        gradients: whether those of gradients are.
        bins: of each histogram.

    Raises:
        ConfigError: a number is too small, or a pattern matches no parameter.
    """

    order = 52
    trainer: Trainer

    def __init__(
        self,
        windows: int = 10,
        *,
        match: str | Sequence[str] = "*",
        weights: bool = True,
        gradients: bool = True,
        bins: int = 64,
    ) -> None:
        for key, value in (("windows", windows), ("bins", bins)):
            if value < 1:
                raise ConfigError(f"{key}={value}; it is at least 1")
        self._windows = windows
        self._patterns = [match] if isinstance(match, str) else [*match]
        self._weights = weights
        self._gradients = gradients
        self._bins = bins
        self._names: set[str] = set()
        self._norm: Tensor | None = None

    def before_train(self) -> None:
        """Find the parameters that are meant."""
        names = [name for name, p in self.trainer.module.named_parameters() if p.numel()]
        for pattern in self._patterns:
            hits = {name for name in names if fnmatchcase(name, pattern)}
            if not hits:
                hint = did_you_mean(pattern.strip("*."), names)
                raise ConfigError(f"match={pattern!r} matches no parameter; {hint}")
            self._names |= hits

    def after_backward(self) -> None:
        """Measure the gradients."""
        if self.trainer.grad_norm is not None and not self._is_due():
            return  # the trainer measures it, to clip
        named = {
            name: p.grad
            for name, p in self.trainer.module.named_parameters()
            if p.grad is not None and not p.grad.is_sparse
        }
        if not named:
            return
        norms = torch.stack(torch._foreach_norm([*named.values()]))  # (num_parameters,)
        self._norm = torch.linalg.vector_norm(norms)
        if self._is_due() and self._gradients:
            self._put("gradient_norms", norms)
            for name in self._names & named.keys():
                self._put(f"gradients/{name}", named[name])

    def after_step(self) -> None:
        """Put the norm, and the histograms of the new weights if it is time."""
        if self.trainer.grad_norm is None and self._norm is not None:  # or the trainer puts it
            self.trainer.storage.put_scalar("grad_norm", self._norm)
        if self._weights and self._is_due():
            for name, parameter in self.trainer.module.named_parameters():
                if name in self._names:
                    self._put(f"weights/{name}", parameter)

    def _is_due(self) -> bool:
        """Whether this iteration is the last of such a window, on the rank that writes."""
        iteration = self.trainer.iter + 1
        due = iteration % (self.trainer.window * self._windows) == 0
        return due and self.trainer.where.is_main

    def _put(self, name: str, values: Tensor) -> None:
        self.trainer.storage.put_histogram(name, values.detach(), bins=self._bins)

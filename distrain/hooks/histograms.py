"""Histograms: of weights and gradients, and the norm of all gradients."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from distrain.checks import did_you_mean, whole, wrong
from distrain.scalar_names import GRAD_NORM
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer


class Histograms(HookBase):
    """Puts `grad_norm` in each iteration, and histograms in the last one of every n-th window.

    `grad_norm` is the 2-norm of all gradients together, averaged over ranks, before clipping.
    Histograms are `weights/NAME` after the update, `gradients/NAME` before clipping, and
    `gradient_norms`, of the 2-norms of all parameters' gradients. All are counted on the device and
    read back when the window is written. Sparse gradients are skipped.

    Args:
        windows: n, in windows of `trainer.window` iterations.
        match: name pattern of the parameters that get histograms, or several.
        weights: put histograms of weights.
        gradients: put histograms of gradients.
        bins: of each histogram.
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
        self._windows = whole("windows", windows, least=1)
        self._patterns = [match] if isinstance(match, str) else [*match]
        self._weights = weights
        self._gradients = gradients
        self._bins = whole("bins", bins, least=1)
        self._names: set[str] = set()
        self._norm: Tensor | None = None

    def before_train(self) -> None:
        names = [name for name, p in self.trainer.module.named_parameters() if p.numel()]
        for pattern in self._patterns:
            hits = {name for name in names if fnmatchcase(name, pattern)}
            if not hits:
                hint = did_you_mean(pattern.strip("*."), names)
                raise wrong("match", pattern, f"a pattern of parameter names; {hint}")
            self._names |= hits

    def after_backward(self) -> None:
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
        if self.trainer.grad_norm is None and self._norm is not None:  # else the trainer puts it
            self.trainer.storage.put_scalar(GRAD_NORM, self._norm)
        if self._weights and self._is_due():
            for name, parameter in self.trainer.module.named_parameters():
                if name in self._names:
                    self._put(f"weights/{name}", parameter)

    def _is_due(self) -> bool:
        """Whether this iteration is the last of an n-th window, on the rank that writes."""
        iteration = self.trainer.iter + 1
        due = iteration % (self.trainer.window * self._windows) == 0
        return due and self.trainer.where.is_main

    def _put(self, name: str, values: Tensor) -> None:
        self.trainer.storage.put_histogram(name, values.detach(), bins=self._bins)

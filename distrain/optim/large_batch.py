"""LARS and LAMB: layer-wise trust ratios for large batches.

Both multiply the update of a tensor by a ratio of norms, in foreach kernels and without a read-back
from the device. A tensor of norm 0 has the ratio 1.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from distrain.checks import number, wrong


class _TrustRatio(Optimizer):
    """Base: lists of tensors per group, device and dtype, with or without the ratio."""

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = {}  # one device and dtype, with or without the ratio
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} takes no sparse gradients")
                adapts = p.dim() > 1 if group["adapt"] is None else bool(group["adapt"])
                alike.setdefault((adapts, p.device, p.dtype), []).append(p)
            for (adapts, _, _), params in alike.items():
                self._update(group, params, [p.grad for p in params if p.grad is not None], adapts)
        return loss

    @abstractmethod
    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], adapts: bool
    ) -> None:
        """Update tensors of one device and dtype, with the trust ratio if `adapts`."""

    def _states(self, params: Iterable[Tensor], *names: str) -> list[list[Tensor]]:
        """Return the state tensors of these names for each parameter, zeros at first."""
        found: list[list[Tensor]] = [[] for _ in names]
        for p in params:
            for name, tensors in zip(names, found, strict=True):
                if name not in self.state[p]:
                    self.state[p][name] = torch.zeros_like(p)
                tensors.append(self.state[p][name])
        return found


class LARS(_TrustRatio):
    """Layer-wise adaptive rate scaling, for momentum SGD with batches of thousands.

    You, Gitman & Ginsburg 2017, "Large Batch Training of Convolutional Networks", arXiv:1708.03888,
    algorithm 1, for each tensor w with gradient g, rate `lr` and weight decay b::

        ratio = trust * |w| / (|g| + b * |w|)
        v = momentum * v + lr * ratio * (g + b * w)
        w = w - v

    Example: w = (3, 4), g = (0, 1), trust 0.3, b 0.1, lr 0.1: ratio 0.3 * 5 / 1.5 = 1, v = (0.03,
    0.14), w = (2.97, 3.86).

    Args:
        params: parameters, or groups of them; ConfigError for a value out of range.
        lr: learning rate, >= 0.
        momentum: fraction of the previous update.
        weight_decay: b.
        trust: the trust coefficient, > 0.
        adapt: whether a group has the ratio (else 1); None: tensors of two dimensions or more, so
            that biases and parameters of norms follow plain SGD.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        adapt: bool | None = None,
    ) -> None:
        number("momentum", momentum)
        number("weight_decay", weight_decay)
        number("trust", trust, above=0.0)
        keys = {"momentum": momentum, "weight_decay": weight_decay, "trust": trust}
        super().__init__(params, {"lr": lr, **keys, "adapt": adapt})

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], adapts: bool
    ) -> None:
        decay, factors = group["weight_decay"], group["lr"]
        if adapts:
            of_w, of_g = _norms(params), _norms(grads)  # (num_params,) each
            ratio = _ratio(group["trust"] * of_w, of_g + decay * of_w, where=of_g)
            factors = (ratio * factors).unbind()
        steps = torch._foreach_add(grads, params, alpha=decay) if decay else grads
        steps = torch._foreach_mul(steps, factors)
        (momenta,) = self._states(params, "momentum_buffer")
        torch._foreach_mul_(momenta, group["momentum"])
        torch._foreach_add_(momenta, steps)
        torch._foreach_sub_(params, momenta)


class LAMB(_TrustRatio):
    """Layer-wise adaptive moments, Adam for batches of thousands.

    You et al. 2019, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
    arXiv:1904.00962, algorithm 2 with phi(x) = x, for each tensor w with gradient g in its update t
    and weight decay b::

        m = beta1 * m + (1 - beta1) * g         v = beta2 * v + (1 - beta2) * g ** 2
        r = m / (1 - beta1 ** t) / (sqrt(v / (1 - beta2 ** t)) + eps) + b * w
        w = w - lr * |w| / |r| * r

    Example: t = 1, w = (3, 4), g = (2, -5), b 0.5, lr 0.1: r = (1 + 1.5, -1 + 2), |r| = 2.6926,
    ratio 1.8570, w = (2.5358, 3.8143).

    Args:
        params: parameters, or groups of them; ConfigError for a value out of range.
        lr: learning rate, >= 0.
        betas: of both moments, in [0, 1).
        eps: added to the root.
        weight_decay: b.
        adapt: as in `LARS`; without the ratio an update is AdamW's.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        adapt: bool | None = None,
    ) -> None:
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise wrong("betas", betas, "two numbers in [0, 1)")
        number("eps", eps)
        number("weight_decay", weight_decay)
        keys = {"betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {"lr": lr, **keys, "adapt": adapt})

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], adapts: bool
    ) -> None:
        beta1, beta2 = group["betas"]
        updates = []
        for p in params:
            self.state[p]["step"] = self.state[p].get("step", 0) + 1
            updates.append(self.state[p]["step"])
        first, second = self._states(params, "exp_avg", "exp_avg_sq")
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
        roots = torch._foreach_div(second, [1 - beta2**t for t in updates])
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, group["eps"])
        steps = torch._foreach_div(first, [1 - beta1**t for t in updates])
        torch._foreach_div_(steps, roots)
        if group["weight_decay"]:
            torch._foreach_add_(steps, params, alpha=group["weight_decay"])
        factors = group["lr"]
        if adapts:
            of_w, of_step = _norms(params), _norms(steps)  # (num_params,) each
            factors = (_ratio(of_w, of_step, where=of_step) * factors).unbind()
        torch._foreach_mul_(steps, factors)
        torch._foreach_sub_(params, steps)


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return the (n,) 2-norms of n tensors, in float32 or wider: float16 overflows at 65504."""
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm([*tensors], 2, dtype=dtype))


def _ratio(numerator: Tensor, denominator: Tensor, *, where: Tensor) -> Tensor:
    """Return the quotients, 1 where the numerator or `where` is 0; all (n,)."""
    is_defined = (numerator > 0) & (where > 0)
    return torch.where(is_defined, numerator / denominator, torch.ones_like(numerator))

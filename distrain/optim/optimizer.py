"""The optimizer of a run: parameter groups by rules, any optimizer class."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from distrain.checks import did_you_mean
from distrain.errors import ConfigError
from distrain.optim.groups import GroupRow, explain_groups, format_groups, param_groups
from distrain.optim.rules import MATCH_KEYS, Rules, parse, plain, resolve

__all__ = [
    "GroupRow",
    "build_optimizer",
    "explain_groups",
    "format_groups",
    "param_groups",
    "representative_group",
    "start_momentum",
]

OWN_KEYS: tuple[str, ...] = (
    "weight_decay_norm",
    "bias_lr_factor",
    "weight_decay_bias",
    "rules",
    "layer_decay",
    "layers",
    "target",
)  # of `optim`, not of the optimizer's class


def build_optimizer(
    model: nn.Module,
    *,
    target: str = "torch.optim.SGD",
    lr: float,
    weight_decay: float = 0.0,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float = 1.0,
    weight_decay_bias: float | None = None,
    rules: Rules = (),
    layer_decay: float | None = None,
    layers: str | None = None,
    fused: bool | None = None,
    **keywords: Any,
) -> Optimizer:
    """Return an optimizer of any class over the model's parameter groups.

    The implementation is torch's own choice (the loop over tensors on the CPU, foreach on CUDA): it
    is right in every case. No fused kernel is, so none is chosen unasked. Found in torch 2.13:

    - All of them on the CPU walk through memory without regard to strides: a gradient that lies in
      memory otherwise than its parameter changes the wrong elements, silently. Autograd lays out a
      gradient like its parameter where that is dense; code that assigns `grad` may not.
    - SGD and Adagrad refuse sparse gradients, which their loops take; SGD in float16 and bfloat16
      leaves most elements untouched (pytorch issue 191763).
    - SGD with momentum keeps uninitialised memory as momentum if its first step overflows, and
      raises if a parameter gets its first gradient later than others. `Trainer` prevents both, see
      `start_momentum`.

    `fused=True` is the fastest on the CPU, and right for dense float32 parameters whose gradients
    come from autograd. It rounds in another order than the loop: SGD with momentum, Adam, AdamW and
    Adagrad differ in the last bits (20 steps in float32: up to 2e-7 of the largest value), and
    repeat themselves exactly with any number of threads.

    Args:
        model: the model, plain or wrapped; on its device already.
        target: import path of a `torch.optim.Optimizer` class.
        lr: learning rate, > 0.
        weight_decay: see `param_groups`; must be 0 where the optimizer has none.
        weight_decay_norm: see `param_groups`.
        bias_lr_factor: see `param_groups`.
        weight_decay_bias: see `param_groups`.
        rules: see `param_groups`; they may set any keyword of the optimizer.
        layer_decay: see `param_groups`.
        layers: see `param_groups`.
        fused: True asks for the fused kernels, False forbids them; None is torch's own choice.
        **keywords: of the optimizer, such as `momentum` or `betas`; lists become tuples.

    Raises:
        ConfigError: the target is no optimizer, or does not take a keyword or value.
    """
    optimizer_class = _optimizer_class(target)
    create: Callable[..., Optimizer] = optimizer_class
    keywords = {key: plain(value) for key, value in keywords.items()}
    allowed = _allowed_keywords(optimizer_class)
    if fused or (fused is not None and (allowed is None or "fused" in allowed)):
        keywords["fused"] = fused
    _check_keywords(target, allowed, keywords, rules)
    groups = param_groups(
        model,
        lr=lr,
        weight_decay=weight_decay,
        weight_decay_norm=weight_decay_norm,
        bias_lr_factor=bias_lr_factor,
        weight_decay_bias=weight_decay_bias,
        rules=rules,
        layer_decay=layer_decay,
        layers=layers,
    )
    if allowed is None or "weight_decay" in allowed:
        keywords["weight_decay"] = float(weight_decay)
    elif any(group.pop("weight_decay") for group in groups):
        raise ConfigError(f"{target} has no weight decay; leave weight_decay and its kin at 0")
    try:
        return create(groups, lr=float(lr), **keywords)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"{target} refuses its settings: {error}") from error


def representative_group(optimizer: Optimizer) -> int:
    """Return the index of the group whose learning rate stands for the run.

    It is the group with most parameters (tensors) of those that are trained: a group whose initial
    rate is 0 or whose parameters are all frozen counts only where there is no other. Where each
    holds a single one, it is the first with the most common initial learning rate. Example: groups
    of 1, 3, 2 tensors -> 1, and with a rate of 0 for the second -> 2; three groups of one tensor
    with 0.1, 0.2, 0.2 -> 1.
    """
    groups = optimizer.param_groups
    rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
    trained = [
        index
        for index, group in enumerate(groups)
        if rates[index] and any(p.requires_grad for p in group["params"])
    ] or range(len(groups))
    largest = max(trained, key=lambda index: len(groups[index]["params"]))
    if len(groups[largest]["params"]) > 1:
        return largest
    common = Counter(rates[index] for index in trained).most_common(1)[0][0]
    return next(index for index in trained if rates[index] == common)


def start_momentum(optimizer: Optimizer) -> None:
    """Give a fused SGD momenta of zero before its first step; any other optimizer stays as it is.

    Without them torch makes the momenta of all parameters in the first step, only if no parameter
    has one, and of memory that stays uninitialised where that step overflows. The update is the
    same: 0 * momentum + g = g.

    Raises:
        ConfigError: dampening is set: the first momentum would be (1 - dampening) * g, not g.
    """
    if type(optimizer) is not SGD:
        return
    for group in optimizer.param_groups:
        if not group["fused"] or not group["momentum"]:
            continue
        if group["dampening"]:
            raise ConfigError("optim.fused=true: expected no dampening; set optim.fused=false")
        for parameter in group["params"]:
            if optimizer.state[parameter].get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _optimizer_class(target: str) -> type[Optimizer]:
    """Return the class that the import path names."""
    names = [name for name, value in vars(torch.optim).items() if _is_optimizer(value)]
    if isinstance(target, str) and target in names:
        raise ConfigError(f"target={target!r} is no import path; give torch.optim.{target}")
    if not isinstance(target, str) or "." not in target:
        hint = did_you_mean(str(target), names)
        raise ConfigError(f"target={target!r}; give the import path of an optimizer class ({hint})")
    module, _, name = target.rpartition(".")
    if module == "torch.optim" and name not in names:
        raise ConfigError(
            f"target={target!r}: torch.optim has no such optimizer; {did_you_mean(name, names)}"
        )
    found = resolve("target", target)
    if not _is_optimizer(found):
        raise ConfigError(
            f"target={target!r} is not a class of torch.optim.Optimizer; "
            "give the import path of one, such as torch.optim.AdamW"
        )
    optimizer_class: type[Optimizer] = found
    return optimizer_class


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer


def _allowed_keywords(optimizer_class: type[Optimizer]) -> list[str] | None:
    """Return the keywords that the class takes, or None where it takes any."""
    parameters = list(inspect.signature(optimizer_class).parameters.values())
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters if parameter.name != "params"]


def _check_keywords(
    target: str, allowed: list[str] | None, keywords: Mapping[str, Any], rules: Rules
) -> None:
    """Raise ConfigError for a keyword that the optimizer would not take, in a rule too."""
    if allowed is None:
        return
    ours = ("lr_factor", "layer_decay", *MATCH_KEYS)
    asked = [(key, key, OWN_KEYS) for key in keywords]
    for rule in parse(rules):
        asked += [(f"rules.{rule.name}.{key}", key, ours) for key in rule.settings]
    for where, key, also in asked:
        if key not in allowed and key not in also:
            known = sorted({*allowed, *also})
            raise ConfigError(
                f"{where}: {target} takes no {key!r} ({did_you_mean(key, known)}); "
                f"allowed: {', '.join(known)}"
            )

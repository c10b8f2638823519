"""The optimizer of a run: any optimizer class over parameter groups."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from distrain.checks import did_you_mean, wrong
from distrain.errors import ConfigError
from distrain.optim.combined import CombinedOptimizer, split_parameters
from distrain.optim.groups import GroupRow, GroupSettings, explain_groups, param_groups
from distrain.optim.rules import MATCH_KEYS, Rules, parse, plain, resolve

_GROUP_KEYS = tuple(GroupSettings.__annotations__)
_DEFAULT_TARGET = "torch.optim.SGD"


def build_optimizer(
    model: nn.Module,
    *,
    target: str = _DEFAULT_TARGET,
    lr: float,
    weight_decay: float = 0.0,
    fused: bool | None = None,
    groups: Mapping[str, Mapping[str, Any] | None] | None = None,
    **keywords: Any,
) -> Optimizer:
    """Return an optimizer of any class over the model's parameter groups.

    The default implementation is torch's choice (the loop over tensors on the CPU, foreach on
    CUDA), which is right in every case. Fused kernels are not, in torch 2.13:

    - On the CPU all of them ignore strides: a gradient with other strides than its parameter
      changes the wrong elements, silently. Autograd gives a gradient its parameter's strides where
      those are dense; code that assigns `grad` may not.
    - SGD and Adagrad refuse sparse gradients, which their loops take; SGD in float16 and bfloat16
      leaves most elements unchanged (pytorch issue 191763).
    - SGD with momentum keeps uninitialised memory as momentum if its first step overflows, and
      raises if a parameter gets its first gradient later than others. `Trainer` prevents both, see
      `start_momentum`.

    `fused=True` is the fastest on the CPU, and right for dense float32 parameters whose gradients
    come from autograd. It rounds in another order than the loop: SGD with momentum, Adam, AdamW and
    Adagrad differ in the last bits (20 steps in float32: up to 2e-7 of the largest value), and
    repeat exactly with any number of threads.

    Args:
        model: the model, plain or wrapped; on its device already.
        target: import path of a `torch.optim.Optimizer` class.
        lr: learning rate, > 0.
        weight_decay: see `param_groups`; must be 0 where the optimizer has none.
        fused: True asks for fused kernels, False forbids them; None is torch's choice.
        groups: other optimizers by name, for the parameters that they match: `match`, `module` and
            `dims` as of a `Rule`, `target`, and any other keyword of this function; the first that
            matches a parameter has it. Rates, weight decays and rules that one leaves out are these
            here.
        **keywords: settings of `param_groups`, whose rules may set any keyword of the optimizer;
            and keywords of the optimizer, such as `momentum` or `betas`; lists become tuples.

    Raises:
        ConfigError: the target is no optimizer, or does not take a keyword or value.
    """
    own = {"target": target, "lr": lr, "weight_decay": weight_decay, **keywords}
    if not groups:
        return _one(model, fused=fused, **own)
    optimizers = []
    for name, members, settings in optimizer_parts(model, groups, fused=fused, **own):
        try:
            optimizers.append(_one(model, among=members, label=name, **settings))
        except ConfigError as error:
            if not name:
                raise
            is_key = re.split("[=.:]", str(error), maxsplit=1)[0] in settings
            raise ConfigError(f"groups.{name}{'.' if is_key else ': '}{error}") from error
    return CombinedOptimizer(optimizers)


def optimizer_parts(
    model: nn.Module, groups: Mapping[str, Mapping[str, Any] | None], **own: Any
) -> list[tuple[str, set[nn.Parameter], dict[str, Any]]]:
    """Return name, parameters and keywords of each optimizer; the last has the rest, and "".

    `groups` and `own` are keywords of `build_optimizer`.
    """
    shared = {key: own[key] for key in ("lr", "weight_decay", *_GROUP_KEYS) if key in own}
    found, rest = split_parameters(model, groups)
    if not rest:
        raise ConfigError(
            f"groups: expected parameters left for target={own['target']}; all are in "
            f"{', '.join(found)}"
        )
    parts = [(name, members, shared | settings) for name, (members, settings) in found.items()]
    return [*parts, ("", rest, own)]


def explain_optimizer(model: nn.Module, **settings: Any) -> list[GroupRow]:
    """Return one row per trainable parameter, as `explain_groups`, for `build_optimizer`."""
    groups = settings.pop("groups", None)
    parts = optimizer_parts(model, groups, **settings) if groups else [("", None, settings)]
    keys = ("lr", "weight_decay", *_GROUP_KEYS)
    rows = []
    for name, members, keywords in parts:
        used: Any = {"weight_decay": 0.0} | {k: v for k, v in keywords.items() if k in keys}
        for row in explain_groups(model, among=members, **used):
            target = str(keywords.get("target", _DEFAULT_TARGET)).rpartition(".")[2]
            why = f"{row.why}; {target}" if groups else row.why
            rows.append(row._replace(group=_labelled(row.group, name), why=why))
    return rows


def _labelled(group: str, label: str) -> str:
    """Return the name of a group with that of its optimizer: `muon`, `muon/head`."""
    return "/".join(filter(None, (label, group if group != "default" or not label else "")))


def _one(
    model: nn.Module,
    *,
    target: str = _DEFAULT_TARGET,
    lr: float,
    weight_decay: float = 0.0,
    fused: bool | None = None,
    among: Container[nn.Parameter] | None = None,
    label: str = "",
    **keywords: Any,
) -> Optimizer:
    """Return the optimizer of some of the parameters, see `build_optimizer`."""
    settings: Any = {key: keywords.pop(key) for key in _GROUP_KEYS if key in keywords}
    optimizer_class = _optimizer_class(target)
    create: Callable[..., Optimizer] = optimizer_class
    keywords = {key: plain(value) for key, value in keywords.items()}
    allowed = _allowed_keywords(optimizer_class)
    if fused or (fused is not None and (allowed is None or "fused" in allowed)):
        keywords["fused"] = fused
    if allowed is not None:
        _check_keywords(target, allowed, keywords, settings.get("rules", ()))
    groups = param_groups(model, lr=lr, weight_decay=weight_decay, among=among, **settings)
    for group in groups:
        group["name"] = _labelled(group["name"], label)
    if allowed is None or "weight_decay" in allowed:
        keywords["weight_decay"] = float(weight_decay)
    elif any(group.pop("weight_decay") for group in groups):
        raise ConfigError(f"{target} has no weight decay; set weight_decay and weight_decay_* to 0")
    try:
        return create(groups, lr=float(lr), **keywords)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(f"{target} refuses its settings: {error}") from error


def representative_group(optimizer: Optimizer) -> int:
    """Return the index of the group whose learning rate is reported for the run.

    It is the trained group with most tensors: a group whose initial rate is 0 or whose parameters
    are all frozen counts only if all are such. Where each holds one tensor, it is the first with
    the most common initial learning rate. Example: groups of 1, 3, 2 tensors -> 1, and with a rate
    of 0 for the second -> 2; three groups of one tensor with 0.1, 0.2, 0.2 -> 1.
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
    """Give a fused SGD momenta of zero before its first step; other optimizers are not changed.

    Without them torch allocates the momenta of all parameters in the first step, only if no
    parameter has one, and leaves them uninitialised where that step overflows. The update is the
    same: 0 * momentum + g = g.

    Raises:
        ConfigError: dampening is set: the first momentum would be (1 - dampening) * g, not g.
    """
    if isinstance(optimizer, CombinedOptimizer):
        for each in optimizer.optimizers:
            start_momentum(each)
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
    names = [name for name, value in vars(torch.optim).items() if _is_optimizer(value)]
    module, _, name = str(target).rpartition(".")
    if not module or (module == "torch.optim" and name not in names):
        hint = f"torch.optim.{name}" if name in names else did_you_mean(name, names)
        raise wrong("target", target, f"the import path of an optimizer class ({hint})")
    found: type[Optimizer] = resolve("target", target)
    if not _is_optimizer(found):
        raise wrong("target", target, "a class of torch.optim.Optimizer, as torch.optim.AdamW")
    return found


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer


def _allowed_keywords(optimizer_class: type[Optimizer]) -> list[str] | None:
    """Return the keywords that the class takes, or None if it takes any."""
    parameters = inspect.signature(optimizer_class).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return [parameter.name for parameter in parameters if parameter.name != "params"]


def _check_keywords(
    target: str, allowed: list[str], keywords: Mapping[str, Any], rules: Rules
) -> None:
    """Raise ConfigError for a keyword that the optimizer does not take, also in a rule."""
    asked: list[tuple[str, str, tuple[str, ...]]]
    asked = [(key, key, (*_GROUP_KEYS, "target")) for key in keywords]
    for rule in parse(rules):
        ours = ("lr_factor", "layer_decay", *MATCH_KEYS)
        asked += [(f"rules.{rule.name}.{key}", key, ours) for key in rule.settings]
    for label, key, also in asked:
        if key not in allowed and key not in also:
            known = sorted({*allowed, *also})
            raise ConfigError(
                f"{label}: {target} takes no {key!r} ({did_you_mean(key, known)}); "
                f"allowed: {', '.join(known)}"
            )

"""Parameter groups: assign learning rate and weight decay per parameter, and explain why."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from typing_extensions import Unpack

from distrain.checks import number
from distrain.errors import ConfigError
from distrain.optim.layer_decay import with_layer_decay
from distrain.optim.rules import Place, Rule, Rules
from distrain.text import table

# _NormBase: batch norms (lazy, synchronised and distrain's own too) and instance norms
NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel)


class GroupSettings(TypedDict, total=False):
    """Keywords of `param_groups` beyond `lr` and `weight_decay`, and of all that pass them on."""

    weight_decay_norm: float | None
    bias_lr_factor: float
    weight_decay_bias: float | None
    rules: Rules
    layer_decay: float | None
    layers: str | None


class GroupRow(NamedTuple):
    """One line of the table: a parameter and its group.

    Args:
        name: of the parameter in the model.
        shape: of the parameter; None for a lazy one before its first batch.
        group: name of its group.
        lr: learning rate, before any schedule.
        weight_decay: weight decay.
        why: the kind of the parameter, then the rules that apply.
    """

    name: str
    shape: tuple[int, ...] | None
    group: str
    lr: float
    weight_decay: float
    why: str


@dataclass
class _Assigned:
    """A parameter with its settings; `label` is the rules' part of a group's name and the kind."""

    places: list[Place]
    parameter: nn.Parameter
    label: tuple[str, str]
    settings: dict[str, Any]
    why: str


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    among: Container[nn.Parameter] | None = None,
    **settings: Unpack[GroupSettings],
) -> list[dict[str, Any]]:
    """Return the parameter groups for an optimizer, one per different settings.

    Each trainable parameter is in exactly one group. Parameters of norm layers, their biases
    included, take `weight_decay_norm`; other biases (`bias`, `bias_*`, `*_bias`) take
    `lr * bias_lr_factor` and `weight_decay_bias`; the rest takes `lr` and `weight_decay`. Rules
    apply on top, in their order: for each key, the first rule that matches a parameter and sets the
    key wins. `lr_factor` and `layer_decay` multiply the learning rate found so far, with
    `layer_decay ** (L + 1 - depth)` for L layers (see `Rule`; Clark et al. 2020, ELECTRA): with
    layer_decay 0.5 and two layers 0.125 before them, 0.25, 0.5, and 1 behind. A rule's `lr`
    replaces `lr * bias_lr_factor`; `lr` and `lr_factor` are one key. A shared parameter counts
    where the model names it first; a rule matches it by any of its names.

    The result is the same for a model in DDP, after torch.compile, and before and after conversion
    to SyncBatchNorm.

    Args:
        model: the model; frozen parameters are left out.
        lr: learning rate where no factor applies.
        weight_decay: weight decay of parameters that are neither of a norm nor a bias.
        among: only these parameters are in groups; None for all.
        **settings: `weight_decay_norm`, weight decay of norm layers (default None: as
            `weight_decay`); `bias_lr_factor`, factor on `lr` for biases outside norm layers (1.0);
            `weight_decay_bias`, weight decay of these biases (None: as `weight_decay`); `rules`,
            see `Rule`; `layer_decay`, factor on the rate per layer (None), and `layers`, a pattern
            of its layers' names such as "blocks.{}.*" (None finds them), see `with_layer_decay`.

    Returns:
        dicts with `name`, `params`, `lr`, `weight_decay` and the other keys that rules set, in the
        order in which the model names their first parameters. A group is named `default`, `norm`,
        `bias`, by its rule (`head`, `head/bias`, `nearest.3` for depth 3), or by several with `+`.

    Raises:
        ConfigError: nothing is trainable, a value is out of range, or a rule matches no parameter.
    """
    assigned = _assign(model, lr=lr, weight_decay=weight_decay, among=among, **settings)
    return [
        {"name": name, "params": [member.parameter for member in members], **members[0].settings}
        for name, members in _grouped(assigned).items()
    ]


def explain_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    among: Container[nn.Parameter] | None = None,
    **settings: Unpack[GroupSettings],
) -> list[GroupRow]:
    """Return one row per trainable parameter, in the model's order: its group, and why.

    Arguments and errors are those of `param_groups`.
    """
    assigned = _assign(model, lr=lr, weight_decay=weight_decay, among=among, **settings)
    group = {id(m): name for name, members in _grouped(assigned).items() for m in members}
    return [
        GroupRow(
            name=each.places[0].name,
            shape=None if is_lazy(each.parameter) else tuple(each.parameter.shape),
            group=group[id(each)],
            lr=each.settings["lr"],
            weight_decay=each.settings["weight_decay"],
            why=each.why,
        )
        for each in assigned
    ]


def format_groups(rows: Sequence[GroupRow]) -> str:
    """Return two tables as text: the groups with their sizes, then every parameter and why."""
    groups: dict[str, list[GroupRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    summary = [("group", "tensors", "elements", "lr", "weight_decay")]
    for name, members in groups.items():
        elements = sum(math.prod(row.shape) for row in members if row.shape is not None)
        lr, decay = members[0].lr, members[0].weight_decay
        summary.append((name, str(len(members)), f"{elements:,}", f"{lr:g}", f"{decay:g}"))
    listing = [("parameter", "shape", "group", "lr", "weight_decay", "why")]
    for row in rows:
        shape = "lazy" if row.shape is None else "x".join(map(str, row.shape)) or "scalar"
        numbers = (f"{row.lr:g}", f"{row.weight_decay:g}")
        listing.append((row.name, shape, row.group, *numbers, row.why))
    return f"{table(summary)}\n\n{table(listing)}\n"


def _walk(
    module: nn.Module, prefix: str = "", parents: tuple[nn.Module, ...] = ()
) -> Iterator[tuple[Place, nn.Parameter]]:
    """Yield every place of every parameter, shared ones as often as they occur."""
    inner = module.module if isinstance(module, WRAPPERS) else module._modules.get("_orig_mod")
    if isinstance(inner, nn.Module):  # DDP, DataParallel or torch.compile: their names are left out
        yield from _walk(inner, prefix, parents)
        return
    parents = (*parents, module)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield Place(prefix + name, parents), parameter
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.", parents)


def places_of(model: nn.Module) -> dict[nn.Parameter, list[Place]]:
    """Return all places of each parameter, in the model's order."""
    parameters: dict[nn.Parameter, list[Place]] = {}
    for place, parameter in _walk(model):
        parameters.setdefault(parameter, []).append(place)
    return parameters


def _kind(place: Place) -> str:
    """Return `norm`, `bias` or `weight`; attention and LSTM have `in_proj_bias`, `bias_hh_l0`."""
    if isinstance(place.modules[-1], NORMS):
        return "norm"
    name = place.name.rpartition(".")[2]
    is_bias = name == "bias" or name.startswith("bias_") or name.endswith("_bias")
    return "bias" if is_bias else "weight"


def _assign(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    weight_decay_norm: float | None = None,
    bias_lr_factor: float = 1.0,
    weight_decay_bias: float | None = None,
    rules: Rules = (),
    layer_decay: float | None = None,
    layers: str | None = None,
    among: Container[nn.Parameter] | None = None,
) -> list[_Assigned]:
    """Return each trainable parameter once, in the model's order, with its settings."""
    lr, decay = number("lr", lr, above=0.0), number("weight_decay", weight_decay)
    of_norm = decay if weight_decay_norm is None else number("weight_decay_norm", weight_decay_norm)
    of_bias = decay if weight_decay_bias is None else number("weight_decay_bias", weight_decay_bias)
    defaults = {
        "weight": {"lr": lr, "weight_decay": decay},
        "norm": {"lr": lr, "weight_decay": of_norm},
        "bias": {"lr": lr * number("bias_lr_factor", bias_lr_factor), "weight_decay": of_bias},
    }
    parameters = places_of(model)
    names = {places[0].name: p for p, places in parameters.items()}
    # Frozen parameters count where a rule is checked and layers are numbered: thawing one must not
    # change the settings of the others.
    matched: list[tuple[Rule, dict[nn.Parameter, tuple[int, int]]]] = []
    for rule in with_layer_decay(names, rules, layer_decay, layers):
        members = [p for p, places in parameters.items() if rule.matches(p, places)]
        if not members:
            raise rule.nothing_matched(parameters.values())
        depths, last = rule.depths([parameters[p] for p in members])
        matched.append((rule, {p: (d, last) for p, d in zip(members, depths, strict=True)}))
    assigned = []
    for p, places in parameters.items():
        if p.requires_grad and (among is None or p in among):
            kind = _kind(places[0])
            hits = [(rule, *members[p]) for rule, members in matched if p in members]
            assigned.append(_settle(p, places, kind, defaults[kind], hits))
    if not assigned:
        raise ConfigError(
            f"nothing to train: the model has {len(parameters)} parameters and all are frozen; "
            "set requires_grad=True for some"
        )
    return assigned


def _settle(
    parameter: nn.Parameter,
    places: list[Place],
    kind: str,
    defaults: Mapping[str, Any],
    rules: Sequence[tuple[Rule, int, int]],
) -> _Assigned:
    """Return the settings of one parameter; `rules` match it, each with (depth, last depth)."""
    settings = dict(defaults)
    labels, reasons, factor = [], [kind], 1.0
    taken: set[str] = set()
    for rule, depth, last in rules:
        new = {k: v for k, v in rule.settings.items() if k not in taken}
        if not new:
            continue
        taken |= {"lr", "lr_factor", *new} if new.keys() & {"lr", "lr_factor"} else new.keys()
        text = ", ".join(f"{key}={value}" for key, value in new.items())
        if "layer_decay" in new:
            factor *= new.pop("layer_decay") ** (last - depth)
            labels.append(f"{rule.name}.{depth}")
            text += f" ** {last - depth} (depth {depth} of {last})"
        else:
            labels.append(rule.name)
        if "lr_factor" in new:
            factor *= new.pop("lr_factor")
        settings.update(new)
        reasons.append(f"rule {rule.name}: {text}")
    if factor != 1.0:
        settings["lr"] *= factor
    if len(places) > 1:
        reasons.append(f"shared with {', '.join(place.name for place in places[1:])}")
    return _Assigned(places, parameter, ("+".join(labels), kind), settings, "; ".join(reasons))


def _grouped(assigned: Sequence[_Assigned]) -> dict[str, list[_Assigned]]:
    """Return the groups by name: parameters with equal settings are together."""
    groups: dict[str, list[_Assigned]] = {}
    for each in assigned:
        groups.setdefault(repr(sorted(each.settings.items())), []).append(each)
    named: dict[str, list[_Assigned]] = {}
    all_labels = {each.label for each in assigned}
    for members in groups.values():
        name = base = _name(list(dict.fromkeys(member.label for member in members)), all_labels)
        count = 1
        while name in named:  # a rule may be called `norm` or `bias`
            count += 1
            name = f"{base}_{count}"
        named[name] = members
    return named


def _name(labels: Sequence[tuple[str, str]], all_labels: set[tuple[str, str]]) -> str:
    """Return the name of a group from the (rules, kind) of its members."""
    if ("", "weight") in labels:
        return "default"
    # without the kind if the group has the rules' weights, or all that the rules match
    whole = [
        rules
        for rules in dict.fromkeys(rules for rules, _ in labels if rules)
        if (rules, "weight") in labels or {x for x in all_labels if x[0] == rules} <= {*labels}
    ]
    parts = ["/".join(filter(None, label)) for label in labels if label[0] not in whole]
    return "+".join(whole + parts)

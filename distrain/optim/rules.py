"""A user's rules for parameters: how they are written, what they match, what they set."""

from __future__ import annotations

import fnmatch
import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from distrain.checks import did_you_mean, number
from distrain.errors import ConfigError

Rules = Mapping[str, Mapping[str, Any] | None] | Sequence[Mapping[str, Any]]
MATCH_KEYS = ("match", "module", "layers")


def plain(value: Any) -> Any:
    """Return a YAML value as optimizers want it: lists become tuples, at any depth.

    Integers among floats become floats, as torch refuses `betas: [0, 0.9]` otherwise.
    """
    if not isinstance(value, list | tuple):
        return value
    items = tuple(plain(item) for item in value)
    if {type(item) for item in items} == {int, float}:
        return tuple(float(item) for item in items)
    return items


@dataclass(frozen=True)
class Place:
    """One place at which a parameter hangs in the model; a shared parameter has several.

    Args:
        name: `blocks.3.norm.weight`, without what DDP and torch.compile put before it.
        modules: the modules around it, from the whole model to the layer that owns it.
    """

    name: str
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Rule:
    """One rule: the conditions that all must hold, and what it sets.

    Written in YAML under its name::

        head:    {match: "head.*", lr_factor: 10}
        tables:  {module: torch.nn.Embedding, weight_decay: 0}
        nearest: {match: "encoder.*", layers: "encoder.blocks.{}.*", layer_decay: 0.75}

    `match` is a shell pattern, or a list of them, for the whole parameter name: `*` stands for any
    text, dots included, `?` for one character, `[ab]` for one of several; case counts. `module` is
    the import path or the bare name of a class; all parameters inside a module of that class match.
    Batch norms are one family here, because SyncBatchNorm forgets which of them it replaced.
    `layers` numbers the layers for `layer_decay`: its `{}` stands for a number (several compare
    one after the other).

    Args:
        name: what groups, tables and errors call it.
        patterns: of `match`; empty matches every name.
        module: of `module`; empty matches every class.
        layers: of `layers`; empty for a rule without `layer_decay`.
        settings: the other keys: `lr_factor`, `layer_decay`, or keywords of the optimizer.
    """

    name: str
    patterns: tuple[str, ...] = ()
    module: str = ""
    layers: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def matches(self, places: Iterable[Place]) -> bool:
        """Return whether the parameter at these places is meant: one of them is enough."""
        return any(self._matches(place) for place in places)

    def _matches(self, place: Place) -> bool:
        named = not self.patterns or any(fnmatch.fnmatchcase(place.name, p) for p in self.patterns)
        return named and (not self.module or any(map(self._is_module, place.modules)))

    def _is_module(self, module: nn.Module) -> bool:
        named = self._class
        if named is not None and isinstance(module, named):
            return True
        return self.module in (base.__name__ for base in type(module).__mro__)

    @cached_property
    def _class(self) -> type | None:
        dotted = "." in self.module
        found = (
            resolve(f"rules.{self.name}.module", self.module)
            if dotted
            else getattr(nn, self.module, None)
        )
        if not isinstance(found, type):
            return None  # a bare name is looked for among the model's own classes
        return _BatchNorm if issubclass(found, _BatchNorm) else found

    def depths(self, parameters: Sequence[Sequence[Place]]) -> tuple[list[int], int]:
        """Number the parameters by layer, in the order of the model.

        Args:
            parameters: the places of each parameter that the rule matches, in the model's order.

        Returns:
            the depth of each parameter and the last depth L + 1, for L layers: what comes before
            the first numbered layer has 0, the layers 1 ... L, everything else L + 1. All have 0
            where the rule has no `layers`.

        Raises:
            ConfigError: `layers` numbers no parameter.
        """
        if not self.layers:
            return [0] * len(parameters), 0
        numbered = re.compile(fnmatch.translate(self.layers).replace(r"\{\}", r"(\d+)"))
        found: list[tuple[int, ...] | None] = []
        for places in parameters:
            hits = [hit for place in places if (hit := numbered.match(place.name))]
            found.append(tuple(map(int, hits[0].groups())) if hits else None)
        order = sorted({index for index in found if index is not None})
        if not order:
            names = [places[0].name for places in parameters]
            raise ConfigError(
                f"rules.{self.name}: layers={self.layers!r} numbers no parameter; "
                f"{did_you_mean(self.layers, names)}"
            )
        rank = {index: depth for depth, index in enumerate(order, start=1)}
        first = next(position for position, index in enumerate(found) if index is not None)
        last = len(order) + 1
        return [
            rank[index] if index is not None else 0 if position < first else last
            for position, index in enumerate(found)
        ], last

    def nothing_matched(self, parameters: Iterable[Sequence[Place]]) -> ConfigError:
        """Return the error for a rule that matches no parameter, with names that are near."""
        places = [place for each in parameters for place in each]
        texts = []
        if self.patterns:
            prefixes = (
                ".".join(parts[:end])
                for place in places
                for parts in [place.name.split(".")]
                for end in range(1, len(parts) + 1)
            )
            names = did_you_mean(self.patterns[0].strip("*."), prefixes)
            texts.append(f"match={', '.join(map(repr, self.patterns))} ({names})")
        if self.module:
            classes = (type(module).__name__ for place in places for module in place.modules)
            texts.append(
                f"module={self.module!r} ({did_you_mean(self.module.split('.')[-1], classes)})"
            )
        return ConfigError(f"rules.{self.name} matches no parameter: {' and '.join(texts)}")


def resolve(key: str, path: str) -> Any:
    """Return what an import path such as `torch.nn.Linear` names.

    Args:
        key: what the user calls the value, for the error.
        path: names of packages, modules and attributes with dots between.

    Raises:
        ConfigError: nothing can be imported under that path; the text says what failed.
    """
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"{key}={path!r} cannot be imported ({error}); give the import path of a class"
        ) from error


def parse(rules: Rules) -> list[Rule]:
    """Return the rules in order, each checked.

    Args:
        rules: a mapping from name to rule, in which None switches a rule off, or a list of rules,
            each with a key `name`; without one it is called by its pattern.

    Raises:
        ConfigError: a rule is no mapping, matches by nothing, sets nothing, or a value is wrong.
    """
    if isinstance(rules, Mapping):
        named = [(str(name), rule) for name, rule in rules.items() if rule is not None]
    elif isinstance(rules, Sequence) and not isinstance(rules, str):
        named = [(f"[{index}]", rule) for index, rule in enumerate(rules)]
    else:
        raise ConfigError(f"rules={rules!r}; give a mapping from name to {{match: ..., ...}}")
    return [_parse(name, rule) for name, rule in named]


def _parse(name: str, given: Any) -> Rule:
    if not isinstance(given, Mapping):
        raise ConfigError(f"rules.{name}={given!r}; give a mapping: {{match: ..., lr_factor: ...}}")
    rule = {str(key): plain(value) for key, value in given.items()}
    match = rule.pop("match", ())
    patterns = (match,) if isinstance(match, str) else match
    module, layers = rule.pop("module", ""), rule.pop("layers", "")
    if name.startswith("["):
        name = str(rule.pop("name", "") or "+".join(map(str, patterns or ())) or module or layers)
    where = f"rules.{name}"
    if not isinstance(patterns, tuple) or not all(isinstance(p, str) and p for p in patterns):
        raise ConfigError(f"{where}.match={match!r}; give a name pattern such as 'head.*'")
    for key, value in (("module", module), ("layers", layers)):
        if not isinstance(value, str):
            raise ConfigError(f"{where}.{key}={value!r} is {type(value).__name__}; give text")
    if not (patterns or module or layers):
        raise ConfigError(f"{where} says not what it matches; give one of {', '.join(MATCH_KEYS)}")
    if not rule:
        raise ConfigError(f"{where} sets nothing; give lr_factor, weight_decay, layer_decay, ...")
    if bool(layers) != ("layer_decay" in rule) or (layers and "{}" not in layers):
        raise ConfigError(
            f"{where}: layer_decay needs layers, a pattern with {{}} for the number, and the other "
            f"way round; got layers={layers!r}; such as layers: 'blocks.{{}}.*', layer_decay: 0.75"
        )
    if taken := {"name", "params"} & rule.keys():
        raise ConfigError(f"{where} sets {', '.join(sorted(taken))}, which the group itself needs")
    if {"lr", "lr_factor"} <= rule.keys():
        raise ConfigError(f"{where} sets both lr and lr_factor; give one")
    for key in {"lr", "layer_decay", "lr_factor", "weight_decay"} & rule.keys():
        above = 0.0 if key in ("lr", "layer_decay") else None
        rule[key] = number(f"{where}.{key}", rule[key], above=above)
    return Rule(name, patterns, module, layers, rule)

"""Rules for parameters: parse them, match parameters, number layers."""

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
from torch.nn.parameter import is_lazy

from distrain.checks import did_you_mean, number, whole, wrong
from distrain.errors import ConfigError

Rules = Mapping[str, Mapping[str, Any] | None] | Sequence[Mapping[str, Any]]
MATCH_KEYS = ("match", "module", "dims", "layers")


def plain(value: Any) -> Any:
    """Return a YAML value with tuples for lists, at any depth, as optimizers expect.

    Integers among floats become floats: torch refuses `betas: [0, 0.9]`.
    """
    if not isinstance(value, list | tuple):
        return value
    items = tuple(plain(item) for item in value)
    if {type(item) for item in items} == {int, float}:
        return tuple(float(item) for item in items)
    return items


@dataclass(frozen=True)
class Place:
    """A place of a parameter in the model; a shared parameter has several.

    Args:
        name: `blocks.3.norm.weight`, without the prefixes of DDP and torch.compile.
        modules: the modules that contain it, from the whole model to the layer that owns it.
    """

    name: str
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Rule:
    """One rule: conditions that must all hold, and the settings of parameters that meet them.

    In YAML, under its name::

        head:    {match: "head.*", lr_factor: 10}
        tables:  {module: torch.nn.Embedding, weight_decay: 0}
        nearest: {match: "encoder.*", layers: "encoder.blocks.{}.*", layer_decay: 0.75}

    `match` is a shell pattern, or a list of them, for the whole parameter name: `*` matches any
    text, dots included, `?` one character, `[ab]` one of several; case counts. `module` is the
    import path or the bare name of a class; all parameters inside a module of that class match.
    Batch norms count as one class, because SyncBatchNorm does not keep the class that it replaced.
    `dims` is the number of dimensions: 2 for matrices.
    `layers` numbers the layers for `layer_decay`: its `{}` stands for a number (several compare
    one after the other).

    Args:
        name: in groups, tables and errors.
        patterns: of `match`; empty matches every name.
        module: of `module`; empty matches every class.
        dims: of `dims`; None matches every parameter.
        layers: of `layers`; empty for a rule without `layer_decay`.
        settings: the other keys: `lr_factor`, `layer_decay`, or keywords of the optimizer.
    """

    name: str
    patterns: tuple[str, ...] = ()
    module: str = ""
    dims: int | None = None
    layers: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def matches(self, parameter: nn.Parameter, places: Iterable[Place]) -> bool:
        """Return whether the rule matches a parameter in one of its places."""
        if self.dims is not None and (is_lazy(parameter) or parameter.dim() != self.dims):
            return False
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
            return None  # a bare name is searched among the model's own classes
        return _BatchNorm if issubclass(found, _BatchNorm) else found

    def depths(self, parameters: Sequence[Sequence[Place]]) -> tuple[list[int], int]:
        """Number the parameters by layer, in the order of the model.

        Args:
            parameters: the places of each parameter that the rule matches, in the model's order.

        Returns:
            the depth of each parameter and the last depth L + 1, for L layers: 0 before the first
            numbered layer, 1 ... L for the layers, else L + 1. All 0 without `layers`.

        Raises:
            ConfigError: `layers` matches no parameter.
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
            expected = f"a pattern that matches a parameter; {did_you_mean(self.layers, names)}"
            raise wrong(f"rules.{self.name}.layers", self.layers, expected)
        rank = {index: depth for depth, index in enumerate(order, start=1)}
        first = next(position for position, index in enumerate(found) if index is not None)
        last = len(order) + 1
        return [
            rank[index] if index is not None else 0 if position < first else last
            for position, index in enumerate(found)
        ], last

    def nothing_matched(
        self, parameters: Iterable[Sequence[Place]], of: str = "rules"
    ) -> ConfigError:
        """Return the error for a rule that matches no parameter, with names spelled like its."""
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
            texts.append(f"match={', '.join(self.patterns)} ({names})")
        if self.module:
            classes = (type(module).__name__ for place in places for module in place.modules)
            texts.append(
                f"module={self.module} ({did_you_mean(self.module.split('.')[-1], classes)})"
            )
        if self.dims is not None:
            texts.append(f"dims={self.dims}")
        return ConfigError(f"{of}.{self.name}: matches no parameter: {' and '.join(texts)}")


def resolve(key: str, path: str) -> Any:
    """Return the object at an import path such as `torch.nn.Linear`, or raise ConfigError."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise wrong(key, path, f"the import path of a class ({error})") from error


def parse(rules: Rules) -> list[Rule]:
    """Return the rules in order, each checked.

    Args:
        rules: a mapping from name to rule, in which None switches a rule off, or a list of rules,
            each with a key `name`, by default its pattern.

    Raises:
        ConfigError: a rule is no mapping, has no condition, sets nothing, or a value is wrong.
    """
    if isinstance(rules, Mapping):
        return [_parse(str(name), rule) for name, rule in rules.items() if rule is not None]
    if isinstance(rules, Sequence) and not isinstance(rules, str):
        return [_parse("", rule) for rule in rules]
    raise wrong("rules", rules, "a mapping from name to {match: ..., lr_factor: ...}")


def _parse(name: str, given: Any) -> Rule:
    if not isinstance(given, Mapping):
        raise wrong(f"rules.{name}", given, "a mapping {match: ..., lr_factor: ...}")
    rule = {str(key): plain(value) for key, value in given.items()}
    layers = rule.pop("layers", "")
    conditions = pop_conditions(f"rules.{name}", rule)
    if not name:
        default = "+".join(conditions["patterns"]) or conditions["module"] or layers
        name = str(rule.pop("name", "") or default)
    key = f"rules.{name}"
    if not isinstance(layers, str):
        raise wrong(f"{key}.layers", layers, "text")
    if not (layers or any(conditions.values())):
        raise ConfigError(f"{key}: no match condition; give one of {', '.join(MATCH_KEYS)}")
    if not rule:
        raise ConfigError(f"{key}: sets nothing; give lr_factor, weight_decay, layer_decay, ...")
    if bool(layers) != ("layer_decay" in rule) or (layers and "{}" not in layers):
        raise ConfigError(
            f"{key}: expected layers, with {{}} for the number, and layer_decay together, as "
            "layers: 'blocks.{}.*', layer_decay: 0.75"
        )
    if taken := {"name", "params"} & rule.keys():
        raise ConfigError(f"{key}: sets {', '.join(sorted(taken))}, keys of the group; drop them")
    if {"lr", "lr_factor"} <= rule.keys():
        raise ConfigError(f"{key}: sets both lr and lr_factor; give one")
    for setting in {"lr", "layer_decay", "lr_factor", "weight_decay"} & rule.keys():
        above = 0.0 if setting in ("lr", "layer_decay") else None
        rule[setting] = number(f"{key}.{setting}", rule[setting], above=above)
    return Rule(name, layers=layers, settings=rule, **conditions)


def pop_conditions(key: str, rule: dict[str, Any]) -> dict[str, Any]:
    """Take `match`, `module`, `dims` out of a rule, as keywords of `Rule`; ConfigError if wrong."""
    match, module = rule.pop("match", ()), rule.pop("module", "")
    dims = rule.pop("dims", None)
    patterns = (match,) if isinstance(match, str) else match
    if not isinstance(patterns, tuple) or not all(isinstance(p, str) and p for p in patterns):
        raise wrong(f"{key}.match", match, "a name pattern such as head.*")
    if not isinstance(module, str):
        raise wrong(f"{key}.module", module, "text")
    dims = dims if dims is None else whole(f"{key}.dims", dims, least=1)
    return {"patterns": patterns, "module": module, "dims": dims}

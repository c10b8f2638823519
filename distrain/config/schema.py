"""Schema of the configuration: keys, types, ranges and defaults; `check` applies it."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from distrain.checks import did_you_mean, one_of, parsed_number, refuse_url, wrong
from distrain.errors import ConfigError


@dataclass(frozen=True)
class AtLeast:
    """A number of at least `limit`."""

    limit: int

    def __call__(self, key: str, value: float) -> None:
        """Raise ConfigError for a smaller number."""
        if value < self.limit:
            raise wrong(key, value, f"at least {self.limit}")


def positive(key: str, value: float) -> None:
    """Raise ConfigError for a number that is not above 0."""
    if value <= 0:
        raise wrong(key, value, "a number above 0")


def printable(key: str, value: str) -> None:
    """Raise ConfigError for an empty text, control characters or outer blanks."""
    if not value.isprintable() or value != value.strip():
        raise wrong(key, repr(value), "text without control characters and outer blanks")
    if not value:
        raise ConfigError(f"{key}: expected a value, {key}=...")


def run_name(key: str, value: str) -> None:
    """Raise ConfigError for a name outside the folder of all runs, or like an option."""
    if value.startswith(("-", "/")) or not {".", ".."}.isdisjoint(value.split("/")):
        raise wrong(key, value, "a name without a leading - or /, and without . or ..")


class Target(dict[str, Any]):
    """A node for `config.build`: `_target_` and the object's keywords."""


@dataclass
class RunKeys:
    """`run.*`: name and folder of the run."""

    name: Annotated[str, printable, refuse_url, run_name]
    dir: Annotated[str, printable, refuse_url]


@dataclass
class DataKeys:
    """`data.*`: data sets, batches and loaders."""

    batch_size: Annotated[int, AtLeast(1)]
    train: Target | None
    eval: Target | None = None
    eval_batch_size: Annotated[int, AtLeast(1)] | None = None
    workers: Annotated[int, AtLeast(0)] = 0
    seed_samples: bool = False
    collate: str | None = None
    loader: Target | None = None
    sampler: Target | None = None


@dataclass
class FsdpKeys:
    """`trainer.fsdp.*`: sharding of the model."""

    blocks: list[Any] | None = None
    reshard_after_forward: bool = True


@dataclass
class TrainerKeys:
    """`trainer.*`: the loop and its step."""

    max_iter: Annotated[int, AtLeast(1)]
    window: Annotated[int, AtLeast(1)] = 20
    accumulation: Annotated[int, AtLeast(1)] = 1
    clip_norm: Annotated[float, positive] | None = None
    clip_value: Annotated[float, positive] | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    float32_matmul: Literal["highest", "high", "medium"] | None = None
    deterministic: bool = False
    compile: bool = False
    channels_last: bool = False
    sync_batchnorm: bool = True
    nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: Annotated[int, AtLeast(1)] = 10
    ddp: dict[str, Any] = field(default_factory=dict)
    comm_hook: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    comm_options: dict[str, Any] = field(default_factory=dict)
    strategy: Literal["ddp", "fsdp"] | Target = "ddp"
    fsdp: FsdpKeys = field(default_factory=FsdpKeys)


@dataclass
class CheckpointKeys:
    """`checkpoint.*`: retention of checkpoints, and failed saves."""

    keep_last: Annotated[int, AtLeast(1)] = 3
    keep_every: Annotated[int, AtLeast(1)] | None = None
    on_error: Literal["warn", "raise"] = "warn"


@dataclass
class InitKeys:
    """`init.*`: initial weights of a new run."""

    weights: Annotated[str, printable, refuse_url] | None = None
    ema: str | None = None
    prefix: str | None = None
    into: str | None = None
    strict: bool = True
    skip: list[Any] = field(default_factory=list)


@dataclass
class OptimKeys:
    """`optim.*`: parameter groups; other keys are keywords of the optimizer."""

    lr: Annotated[float, AtLeast(0)]
    target: str = "torch.optim.SGD"
    weight_decay: Annotated[float, AtLeast(0)] = 0.0
    weight_decay_norm: Annotated[float, AtLeast(0)] | None = None
    bias_lr_factor: Annotated[float, AtLeast(0)] = 1.0
    weight_decay_bias: Annotated[float, AtLeast(0)] | None = None
    rules: dict[str, Any] | list[Any] = field(default_factory=dict)
    layer_decay: Annotated[float, positive] | None = None
    layers: str | None = None
    fused: bool | None = None


OPEN: tuple[type, ...] = (OptimKeys,)
"""Nodes with keys beyond their fields."""


@dataclass
class Keys:
    """The whole configuration."""

    run: RunKeys
    data: DataKeys
    trainer: TrainerKeys
    model: Target
    launch: Target
    optim: OptimKeys | None = None
    schedule: Target | None = None
    transforms: dict[str, Target | None] = field(default_factory=dict)
    checkpoint: CheckpointKeys = field(default_factory=CheckpointKeys)
    hooks: dict[str, Target | None] = field(default_factory=dict)
    init: InitKeys = field(default_factory=InitKeys)
    seed: Annotated[int, AtLeast(0)] = 0
    resume: Literal["auto", "never", "must"] = "auto"
    plan: bool = False
    vars: dict[str, Any] = field(default_factory=dict)


def check(conf: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration with each value in the type of its key, and with defaults.

    Args:
        conf: plain values, as `config.resolve` makes them.

    Raises:
        ConfigError: a key is unknown, missing, of another type or out of range.
    """
    return _node(conf, Keys, "")


def _node(value: Any, cls: type, key: str) -> dict[str, Any]:
    """Check the mapping at `key` against the dataclass `cls`."""
    _check_mapping(value, key)
    hints = typing.get_type_hints(cls, include_extras=True)
    prefix = key + "." if key else ""
    checked: dict[str, Any] = {}
    for name, item in value.items():
        if name in hints:
            checked[name] = _value(item, hints[name], prefix + str(name))
        elif cls in OPEN:
            checked[name] = item
        else:
            raise ConfigError(f"{prefix}{name}: no such key; {did_you_mean(str(name), hints)}")
    for entry in dataclasses.fields(cls):
        if entry.name in checked:
            continue
        if entry.default is not dataclasses.MISSING:
            checked[entry.name] = entry.default
        elif entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
            is_node = dataclasses.is_dataclass(default) and not isinstance(default, type)
            checked[entry.name] = dataclasses.asdict(default) if is_node else default
        else:
            raise ConfigError(f"{prefix}{entry.name}: expected a value")
    return checked


def _value(value: Any, hint: Any, key: str) -> Any:
    """Check one value against a type hint; return it in that type."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        inner, *ranges = typing.get_args(hint)
        checked = _value(value, inner, key)
        for limit in ranges:
            limit(key, checked)
        return checked
    if origin in (types.UnionType, typing.Union):
        return _union(value, typing.get_args(hint), key)
    if origin is Literal:
        return one_of(key, value, typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        return _node(value, typing.cast(type, hint), key)
    if hint is Target:
        return _target(value, key)
    if origin is dict:
        _check_mapping(value, key)
        of = typing.get_args(hint)[1]
        return {k: v if of is Any else _value(v, of, f"{key}.{k}") for k, v in value.items()}
    if origin is list:
        if not isinstance(value, list):
            raise wrong(key, value, "a list")
        return value
    return _plain(value, hint, key)


def _check_mapping(value: Any, key: str) -> None:
    if not isinstance(value, dict):
        raise wrong(key, value, "a mapping of keys, not one value")


def _union(value: Any, hints: tuple[Any, ...], key: str) -> Any:
    """Check a value against `X | None`, or against the member of a union with its type."""
    if value is None and type(None) in hints:
        return None
    if isinstance(value, dict) and Target in hints:
        return _target(value, key)
    rest = [hint for hint in hints if hint is not type(None)]
    by_type = [hint for hint in rest if typing.get_origin(hint) is type(value)]
    return _value(value, (by_type or rest)[0], key)


def _target(value: Any, key: str) -> dict[str, Any]:
    """Check a node for `config.build`."""
    if not isinstance(value, dict):
        raise wrong(key, value, f"a mapping, at least {key}._target_=package.module.Name")
    path = value.get("_target_")
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{key}._target_: expected a value, as in package.module.Name")
    return value


def _plain(value: Any, hint: type, key: str) -> Any:
    """Check a bool, int, float or str."""
    if hint is str:
        if value is None:
            raise ConfigError(f"{key}: expected a value, {key}=...")
        if isinstance(value, bool | int | float | str):
            return str(value)
        raise wrong(key, value, "text")
    if hint is bool:
        if isinstance(value, bool):
            return value
        raise wrong(key, value, "true or false")
    found = parsed_number(value)
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    if not is_number or not abs(found) < math.inf:
        raise wrong(key, value, "a number")
    if (isinstance(found, int) or hint is int) and abs(found) >= 2**63:
        raise wrong(key, value, "a number of less than 64 bits")
    if hint is int and found != int(found):
        raise wrong(key, value, "an integer")
    return hint(found)

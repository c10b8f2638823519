"""Keys of the configuration: their types, ranges and defaults; `check_keys.check` applies them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from distrain.checkpoint.mirror_url import check_url
from distrain.checks import refuse_url, wrong
from distrain.durations import seconds
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


def duration(key: str, value: str) -> None:
    """Raise ConfigError for a text that is not a duration."""
    seconds(key, value)


class Length(str):
    """A number of iterations, or text in epochs: 100, "2 epochs"."""

    __slots__ = ()


class Target(dict[str, Any]):
    """A node for `config.instantiate.build`: `_target_` and the object's keywords."""


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
    eval: Target | dict[str, Target | None] | None = None
    eval_batch_size: Annotated[int, AtLeast(1)] | None = None
    workers: Annotated[int, AtLeast(0)] = 0
    seed_samples: bool = False
    collate: str | Target | None = None
    build_first: bool = False
    loader: Target | None = None
    sampler: Target | None = None


@dataclass
class EvalKeys:
    """`eval.*`: metrics over the whole evaluation set."""

    metrics: dict[str, str | Target | None] = field(default_factory=dict)


@dataclass
class FsdpKeys:
    """`trainer.fsdp.*`: sharding of the model."""

    blocks: list[Any] | None = None
    reshard_after_forward: bool = True


@dataclass
class TrainerKeys:
    """`trainer.*`: the loop and its step."""

    max_iter: Length
    max_epochs: Annotated[float, positive] | None = None
    max_time: Annotated[str, duration] | None = None
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
    """`checkpoint.*`: retention of checkpoints, failed saves, a mirror in an object store."""

    keep_last: Annotated[int, AtLeast(1)] = 3
    keep_every: Annotated[int, AtLeast(1)] | None = None
    on_error: Literal["warn", "raise"] = "warn"
    mirror: Annotated[str, printable, check_url] | None = None
    mirror_wait: Annotated[float, AtLeast(0)] = 300.0


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
    groups: dict[str, Any] = field(default_factory=dict)


OPEN: tuple[type, ...] = (OptimKeys,)
"""Nodes with keys beyond their fields."""


@dataclass
class SweepKeys:
    """`sweep.*`: the objective that a run of a sweep returns."""

    metric: str | None = None
    mode: Literal["max", "min"] = "max"


@dataclass
class Keys:
    """The whole configuration."""

    run: RunKeys
    data: DataKeys
    trainer: TrainerKeys
    model: Target | dict[str, Target]
    launch: Target
    optim: OptimKeys | dict[str, OptimKeys] | None = None
    schedule: Target | dict[str, Target] | None = None
    step: Target | None = None
    transforms: dict[str, Target | None] = field(default_factory=dict)
    eval: EvalKeys = field(default_factory=EvalKeys)
    checkpoint: CheckpointKeys = field(default_factory=CheckpointKeys)
    hooks: dict[str, Target | None] = field(default_factory=dict)
    init: InitKeys = field(default_factory=InitKeys)
    sweep: SweepKeys = field(default_factory=SweepKeys)
    seed: Annotated[int, AtLeast(0)] = 0
    resume: Literal["auto", "never", "must"] = "auto"
    allow_changes: list[Any] = field(default_factory=list)
    plan: bool = False
    vars: dict[str, Any] = field(default_factory=dict)

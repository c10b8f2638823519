"""A new run that starts from the weights of another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from distrain.checks import did_you_mean
from distrain.distributed.collectives import broadcast_from_main
from distrain.distributed.ranks import topology
from distrain.errors import ConfigError, RunFailed
from distrain.files.retry import unreadable
from distrain.log import logger
from distrain.weights.read import locate_weights, read_weights

_SHOWN = 5  # names in an error
_WRAPPERS = ("module.", "_orig_mod.")  # what DDP and torch.compile put before names


def start_from(
    model: nn.Module,
    *,
    weights: str,
    ema: str | None = None,
    prefix: str | None = None,
    into: str | None = None,
    strict: bool = True,
    skip: Sequence[str] = (),
) -> None:
    """Load a model's weights, of another run or of a file, and log on rank 0 what was taken.

    Called by all ranks: rank 0 decides which checkpoint is the newest valid one.

    Args:
        model: before it is wrapped; takes the weights in place.
        weights: see `weights.locate_weights`.
        ema: see `weights.read_weights`.
        prefix: take the tensors whose names begin with it, without it: "model." of Lightning's.
        into: the module of the model that takes them, such as "backbone"; None is the model.
        strict: False lets tensors be that only one side has.
        skip: patterns for names of tensors that are not taken, such as those of a new head.

    Raises:
        ConfigError: there are no such weights, or they do not fit; one line with the names.
        RunFailed: they cannot be read.
    """
    found, mistake, failure = None, None, None
    if topology().is_main:
        try:
            found = str(locate_weights(weights))
        except ConfigError as error:
            mistake = f"init.weights={error}"
        except OSError as error:
            failure = f"init.weights={unreadable(weights, error)}"
    found, mistake, failure = broadcast_from_main((found, mistake, failure))
    if mistake is not None:
        raise ConfigError(mistake)
    if failure is not None:
        raise RunFailed(failure)
    try:
        tensors = read_weights(found, ema=ema)
    except ConfigError as error:
        raise ConfigError(f"init.weights={error}") from error
    except OSError as error:
        raise RunFailed(f"init.weights={unreadable(found, error)}") from error
    if prefix:
        tensors = _without_prefix(tensors, prefix)
    target = _submodule(model, into) if into else model
    num, left = load_tensors(target, tensors, strict=strict, skip=skip)
    if topology().is_main:
        rest = f"; as they were initialised: {_shown(left)}" if left else ""
        logger.info("weights from %s: %d tensors%s", found, num, rest)


def load_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool, skip: Sequence[str]
) -> tuple[int, list[str]]:
    """Copy tensors into a model where names and shapes fit.

    Returns:
        how many, and the names of the model's tensors that stay as they are.

    Raises:
        ConfigError: they do not fit; nothing was copied then.
    """
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    tensors = _unwrapped(tensors, own)
    for pattern in skip:
        if not any(fnmatchcase(name, str(pattern)) for name in (*own, *tensors)):
            names = did_you_mean(str(pattern).strip("*."), own)
            raise ConfigError(f"init.skip={pattern!r} matches no tensor; {names}")
    skipped = {n for n in (*own, *tensors) if any(fnmatchcase(n, str(p)) for p in skip)}
    common = own.keys() & tensors.keys() - skipped
    other_shape = sorted(n for n in common if not _same_shape(own[n], tensors[n]))
    if other_shape:
        shapes = [f"{n} {[*tensors[n].shape]} for {[*own[n].shape]}" for n in other_shape]
        raise ConfigError(
            f"init.weights: tensors of another shape: {_shown(shapes)}; leave those of a new head "
            f"as they are: init.skip=['{other_shape[0].rpartition('.')[0] or other_shape[0]}*']"
        )
    there = {own[name].data_ptr() for name in common if not is_lazy(own[name])}
    # a shared tensor has several names, and files may hold one of them
    missing = [
        name
        for name, tensor in own.items()
        if name not in common | skipped and (is_lazy(tensor) or tensor.data_ptr() not in there)
    ]
    unexpected = [name for name in tensors if name not in common | skipped]
    if not common or (strict and (missing or unexpected)):
        raise ConfigError(_mismatch(missing, unexpected, any_fits=bool(common)))
    if unexpected and topology().is_main:
        logger.info("init.weights: not taken: %s", _shown(unexpected))
    with torch.no_grad():
        model.load_state_dict({name: tensors[name] for name in common}, strict=False)
    return len(common), [name for name in own if name in skipped or name in missing]


def _mismatch(missing: Sequence[str], unexpected: Sequence[str], *, any_fits: bool) -> str:
    """Return the one line that says which names have no partner, and which are near."""
    parts = []
    if missing:
        told = [f"{name} ({did_you_mean(name, unexpected, most=1)})" for name in missing]
        parts.append(f"the model has, but they have not: {_shown(told if unexpected else missing)}")
    if unexpected:
        parts.append(f"they have, but the model has not: {_shown(unexpected)}")
    hint = "init.skip=[PATTERN] leaves tensors out, init.strict=false all of these"
    if not any_fits:
        hint = "no name is in both: see init.prefix and init.into"
    return f"init.weights: {'; '.join(parts) or 'there are no tensors'}; {hint}"


def _unwrapped(tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> Mapping[str, Tensor]:
    for wrapper in _WRAPPERS:
        wrapped = all(name.startswith(wrapper) for name in tensors)
        if wrapped and not any(name.startswith(wrapper) for name in own):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not found:
        raise ConfigError(f"init.prefix={prefix!r} begins no name; {did_you_mean(prefix, tensors)}")
    return found


def _submodule(model: nn.Module, path: str) -> nn.Module:
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if path not in modules:
        raise ConfigError(
            f"init.into={path}: the model has no such module; "
            f"{did_you_mean(path, filter(None, modules))}"
        )
    return modules[path]


def _same_shape(own: Tensor, given: Tensor) -> bool:
    return is_lazy(own) or own.shape == given.shape


def _shown(names: Iterable[str]) -> str:
    names = [*names]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

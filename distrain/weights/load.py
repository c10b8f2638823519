"""Load weights into a model: prefix, submodule, skipped and missing names."""

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
_WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DDP and torch.compile


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
    """Load the weights of a run or file into a model; log a summary on rank 0.

    A collective: rank 0 chooses the newest valid checkpoint.

    Args:
        model: not wrapped yet; loaded in place.
        weights: path, see `locate_weights`.
        ema: see `read_weights`.
        prefix: load only tensors with this prefix, and remove it: "model." of Lightning.
        into: submodule to load into, such as "backbone"; None for the model.
        strict: False ignores missing and unexpected names.
        skip: name patterns of tensors that are not loaded, such as those of a new head.

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
        rest = f"; not loaded, as initialised: {_shown(left)}" if left else ""
        logger.info("weights from %s: %d tensors%s", found, num, rest)


def load_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool, skip: Sequence[str]
) -> tuple[int, list[str]]:
    """Copy tensors into a model.

    Returns:
        Number of tensors copied, and names of the model's tensors that were not.

    Raises:
        ConfigError: names or shapes do not fit; nothing was copied.
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
            f"init.weights: tensors of another shape: {_shown(shapes)}; skip those of a new head: "
            f"init.skip=['{other_shape[0].rpartition('.')[0] or other_shape[0]}*']"
        )
    loaded = {own[name].data_ptr() for name in common if not is_lazy(own[name])}
    # a shared tensor has several names; the file may have only one of them
    missing = [
        name
        for name, tensor in own.items()
        if name not in common | skipped and (is_lazy(tensor) or tensor.data_ptr() not in loaded)
    ]
    unexpected = [name for name in tensors if name not in common | skipped]
    if not common or (strict and (missing or unexpected)):
        raise ConfigError(_mismatch(missing, unexpected, any_fits=bool(common)))
    if unexpected and topology().is_main:
        logger.info("init.weights: unexpected, not loaded: %s", _shown(unexpected))
    with torch.no_grad():
        model.load_state_dict({name: tensors[name] for name in common}, strict=False)
    return len(common), [name for name in own if name in skipped or name in missing]


def _mismatch(missing: Sequence[str], unexpected: Sequence[str], *, any_fits: bool) -> str:
    """Return the error about missing and unexpected names, with similar names."""
    parts = []
    if missing:
        hints = [f"{name} ({did_you_mean(name, unexpected, most=1)})" for name in missing]
        parts.append(f"missing: {_shown(hints if unexpected else missing)}")
    if unexpected:
        parts.append(f"unexpected: {_shown(unexpected)}")
    hint = "init.skip=[PATTERN] skips tensors, init.strict=false all of these"
    if not any_fits:
        hint = "no name is common: see init.prefix and init.into"
    return f"init.weights: {'; '.join(parts) or 'it holds no tensors'}; {hint}"


def _unwrapped(tensors: Mapping[str, Tensor], own: Mapping[str, Any]) -> Mapping[str, Tensor]:
    for wrapper in _WRAPPERS:
        wrapped = all(name.startswith(wrapper) for name in tensors)
        if wrapped and not any(name.startswith(wrapper) for name in own):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    found = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not found:
        raise ConfigError(
            f"init.prefix={prefix!r}: no name begins with it; {did_you_mean(prefix, tensors)}"
        )
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

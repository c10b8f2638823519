"""From a composed configuration to plain values, and from a node with `_target_` to an object.

Configuration is trusted like code: `_target_` may name any callable that can be imported. Treat the
`run.yaml` of a stranger as you would treat a script of theirs.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from distrain import schema
from distrain.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def resolve(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return the composed configuration as checked plain values, with nothing left to look up.

    Args:
        cfg: what Hydra composed, or the same keys as a mapping.

    Raises:
        ConfigError: for a key that is unknown, missing, of a wrong type or out of range.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    composed = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    if OmegaConf.select(composed, "model") is None:
        raise ConfigError("nothing to train: give an experiment, " + experiments())
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(plain, dict)
    return schema.check({str(key): value for key, value in plain.items()})


def experiments() -> str:
    """Return the `+experiment=...` that can be given, for an error message."""
    return "+experiment=" + ("|".join(_options("experiment")) or "NAME")


def explain(error: Exception) -> ConfigError:
    """Return the one line that a user needs of an error of Hydra, OmegaConf or the YAML reader."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, ConfigError):
        return error
    text = str(error) or str(error.__cause__ or type(error).__name__)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = list(error.options or _options(group))
        if group:
            return ConfigError(f"{group}={choice}: no such choice; {_all_of(choice, options)}")
        return ConfigError(f"--config-name={choice}: no such file in the folders searched")
    if isinstance(error, OverrideParseException):
        return ConfigError(f"cannot read {error.override!r}: {text.splitlines()[0]}")
    cause = error if hasattr(error, "full_key") else error.__cause__
    key = str(getattr(cause, "full_key", "") or "")
    if key and text.startswith("Could not override"):
        return ConfigError(f"{key}: no such key; {_near_key(cause, key)} (+{key}=... adds it)")
    if key and text.startswith("Missing mandatory value"):
        return ConfigError(f"{key}: a value is needed, {key}=...")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type="))]
    line = "; ".join(lines)
    return ConfigError(f"{key}: {line}" if key and key not in line else line)


def _options(group: str) -> list[str]:
    """Return the choices of a config group, or nothing where Hydra is not running."""
    from hydra.core.global_hydra import GlobalHydra

    if not group or not GlobalHydra.instance().is_initialized():
        return []
    return list(GlobalHydra.instance().config_loader().get_group_options(group))


def _all_of(word: str, options: list[str]) -> str:
    """Return all choices, and before them the one that is spelled like `word`."""
    near = difflib.get_close_matches(word, options, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return hint + "there is: " + (", ".join(sorted(options)) or "none")


def _near_key(cause: object, key: str) -> str:
    """Return what keys there are beside an unknown one."""
    parent, _, last = key.rpartition(".")
    node = getattr(cause, "parent_node", None)
    names = [str(name) for name in node] if isinstance(node, Mapping) else []
    near = difflib.get_close_matches(last, names, n=3)
    found = [f"{parent}.{name}" if parent else name for name in near or sorted(names)]
    return ("did you mean " + " or ".join(found) + "?") if near else "there is: " + ", ".join(found)


def build(node: Mapping[str, Any], key: str = "", /, **context: Any) -> Any:
    """Return what `node["_target_"]` makes of the node's other keys.

    Nodes inside the node that have a `_target_` are built first. With `_partial_: true` the result
    is a callable that still waits for arguments.

    Args:
        node: `_target_` is the import path of any callable; the other keys are its keywords.
        key: the node's dotted key in the configuration, for error messages.
        context: keywords that are passed too if the callable's signature names them and the
            node does not.

    Raises:
        ConfigError: when the path does not import, a keyword is unknown or missing, or the callable
            raises ValueError.
    """
    target, keywords = _parts(node, key)
    signature = _signature(target)
    if signature is not None:
        names = signature.parameters
        keywords = {k: v for k, v in context.items() if k in names} | keywords
        if not node.get("_partial_"):
            _check_keywords(target, signature, keywords, key)
            _check_numbers(target, signature, keywords, key)
    if node.get("_partial_"):
        return functools.partial(target, **keywords)
    try:
        return target(**keywords)
    except Exception as error:
        # without a signature the call itself is what checks the keywords
        if isinstance(error, ValueError) or (signature is None and isinstance(error, TypeError)):
            raise ConfigError(_placed(str(error), key or name_of(target), keywords)) from error
        error.add_note(f"while building {key or 'a node'}: {name_of(target)}")
        raise


def locate(path: str, key: str = "") -> Any:
    """Return the object at an import path such as `torch.optim.SGD`.

    Args:
        path: module and attributes, joined by dots.
        key: the dotted key that holds the path, for error messages.

    Raises:
        ConfigError: when no module or attribute of that name exists, or importing fails.
    """
    where = f"{key}={path}" if key else path
    found, rest = _import_longest(path, where)
    for name in rest:
        if not hasattr(found, name):
            raise ConfigError(f"{where}: {_nothing_in(found, name)}")
        found = getattr(found, name)
    return found


def name_of(target: object) -> str:
    """Return a callable's name as its user knows it."""
    return str(getattr(target, "__qualname__", target))


def _parts(node: Mapping[str, Any], key: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return a node's callable and its keywords, with nodes inside built."""
    path = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(path, str):
        raise ConfigError(f"{key or node}: needs a _target_, as in package.module.Name")
    target_key = f"{key}._target_" if key else "_target_"
    target = locate(path, target_key)
    if not callable(target):
        raise ConfigError(f"{target_key}={path}: a {type(target).__name__} cannot be called")
    prefix = key + "." if key else ""
    keywords = {k: _built(v, prefix + k) for k, v in node.items() if not _is_ours(k)}
    return target, keywords


def _placed(text: str, key: str, keywords: Mapping[str, Any]) -> str:
    """Return an error's text with the dotted key: `ranks=0: ...` becomes `launch.ranks=0: ...`."""
    name = text.partition("=")[0]
    if name in keywords:
        return f"{key}.{text}"
    return text if text.startswith(f"{key}.") else f"{key}: {text}"


def _is_ours(name: str) -> bool:
    return name in ("_target_", "_partial_")


def _built(value: Any, key: str) -> Any:
    """Return a value with every node inside it built."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return build(value, key)
        return {k: _built(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_built(item, f"{key}.{i}") for i, item in enumerate(value)]
    return value


def _signature(target: Callable[..., Any]) -> inspect.Signature | None:
    """Return the callable's signature, or None for the few built-in ones that have none."""
    try:
        return inspect.signature(target)
    except (TypeError, ValueError):
        return None


def _check_keywords(
    target: Callable[..., Any], signature: inspect.Signature, keywords: dict[str, Any], key: str
) -> None:
    """Raise ConfigError for a keyword that the callable does not take, or needs and lacks."""
    prefix = key + "." if key else ""
    takes = {
        name: p
        for name, p in signature.parameters.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for name in keywords:
        if name not in takes and not takes_any:
            hint = schema.similar(name, list(takes))
            raise ConfigError(f"{prefix}{name}: {name_of(target)} has no such keyword; {hint}")
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in keywords:
            raise ConfigError(f"{prefix}{name}: a value is needed, for {name_of(target)}")


def _check_numbers(
    target: Callable[..., Any], signature: inspect.Signature, keywords: dict[str, Any], key: str
) -> None:
    """Raise ConfigError where something of ours takes a number and gets a text, a list or null.

    Others may be annotated in ways that they do not mean.
    """
    if not str(getattr(target, "__module__", "")).startswith("distrain."):
        return
    made = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(made)
    except NameError:  # of a type that only the type checker imports
        return
    for name, value in keywords.items():
        hint = hints.get(name)
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = set(typing.get_args(hint)) if is_union else {hint}
        is_optional = type(None) in kinds or name not in hints
        if not kinds - {type(None)} <= {int, float} or (value is None and is_optional):
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            whole = "a whole number" if float not in kinds else "a number"
            expected = f"{whole} is needed" + (", or null" if is_optional else "")
            raise schema.wrong(f"{key}.{name}" if key else name, value, expected)
        if float not in kinds and isinstance(value, float) and not value.is_integer():
            raise schema.wrong(f"{key}.{name}" if key else name, value, "a whole number is needed")


def _import_longest(path: str, where: str) -> tuple[Any, list[str]]:
    """Import as many leading parts of the path as are modules; return the last and what is left."""
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ConfigError(f"{where}: this is not an import path like package.module.Name")
    found = _import(parts[0], where)
    if found is None:
        hint = "is it installed, or in the folder you start from?"
        raise ConfigError(f"{where}: there is no module {parts[0]}; {hint}")
    for index, name in enumerate(parts[1:], start=1):
        is_attribute = not isinstance(getattr(found, name, found), ModuleType)
        inner = None if is_attribute else _import(".".join(parts[: index + 1]), where)
        if inner is None:
            return found, parts[index:]
        found = inner
    return found, []


def _import(name: str, where: str) -> ModuleType | None:
    """Import a module; return None if there is none of that name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name or name.startswith(f"{error.name}."):
            return None
        raise ConfigError(f"{where}: importing {name} failed: {error}") from error
    except Exception as error:
        kind = type(error).__name__
        raise ConfigError(f"{where}: importing {name} failed: {kind}: {error}") from error


def _nothing_in(found: object, name: str) -> str:
    """Return the sentence that `found` has no `name`, with the names it has."""
    names = [n for n in dir(found) if not n.startswith("_")]
    if isinstance(found, ModuleType) and hasattr(found, "__path__"):
        names += [module.name for module in pkgutil.iter_modules(found.__path__)]
    owner = getattr(found, "__name__", None) or name_of(type(found))
    near = difflib.get_close_matches(name, sorted(set(names)), n=3)
    return f"{owner} has no {name}" + (f"; did you mean {' or '.join(near)}?" if near else "")

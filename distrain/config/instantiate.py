"""Build objects from nodes: `_target_` and its keywords, with the semantics of Hydra's instantiate.

`_target_` may name any callable that can be imported: configuration is trusted like code.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import pkgutil
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from distrain.checks import did_you_mean, parsed_number, wrong
from distrain.errors import ConfigError

_OWN_KEYS = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
_CONVERT = ("none", "partial", "object", "all")
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


@dataclass(frozen=True)
class _Mode:
    """Settings that the nodes inside a node inherit, unless they have their own."""

    convert: str = "all"
    recursive: bool = True

    def of(self, node: Mapping[str, Any], key: str) -> _Mode:
        """Mode of a node, from its own `_convert_` and `_recursive_` where it has them."""
        convert = str(node.get("_convert_", self.convert)).lower()
        if convert not in _CONVERT:
            expected = "one of " + ", ".join(_CONVERT)
            raise wrong(_join(key, "_convert_"), node["_convert_"], expected)
        return replace(
            self, convert=convert, recursive=_flag(node, "_recursive_", key, self.recursive)
        )


def build(node: Mapping[str, Any], key: str = "", /, **context: Any) -> Any:
    """Return the object that `node["_target_"]` makes of the node's other keys.

    The node's special keys are those of `hydra.utils.instantiate`: `_args_` are positional
    arguments; `_partial_: true` returns a callable that still waits for arguments; nodes inside
    the node are built first, unless `_recursive_: false` passes them as they are; `_convert_: none`
    passes lists and mappings as OmegaConf's. The default differs: plain lists and dicts (`all`).

    Args:
        node: `_target_` is the import path of any callable; the other keys are its keywords.
        key: the node's dotted key in the configuration, for error messages.
        context: keywords that are passed too if the callable's signature names them and the
            node does not.

    Raises:
        ConfigError: when the path does not import, an argument is unknown or missing, or the
            callable raises ValueError.
    """
    return _build(node, key, _Mode(), context)


def _build(node: Mapping[str, Any], key: str, mode: _Mode, context: Mapping[str, Any]) -> Any:
    target = _target(node, key)
    mode = mode.of(node, key)
    args = _positional(node, key, mode)
    keywords = {
        name: _argument(value, _join(key, name), mode)
        for name, value in node.items()
        if name not in _OWN_KEYS
    }
    is_partial = _flag(node, "_partial_", key, False)
    signature = _signature(target)
    if signature is not None:
        free = [*signature.parameters][len(args) :]
        keywords = {k: v for k, v in context.items() if k in free} | keywords
        if not is_partial:
            _check_arguments(target, signature, args, keywords, key)
            keywords = _with_numbers(target, keywords, key)
    if is_partial:
        return functools.partial(target, *args, **keywords)
    try:
        return target(*args, **keywords)
    except Exception as error:
        if isinstance(error, ValueError) or _is_wrong_call(error, target, signature, keywords):
            raise ConfigError(placed(str(error), key or name_of(target), keywords)) from error
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


def keywords_of(target: Callable[..., Any]) -> list[str] | None:
    """Return the names of a callable's arguments, or None where it takes any."""
    signature = _signature(target)
    return None if signature is None or _takes_any(signature) else [*signature.parameters]


def name_of(target: object) -> str:
    """Return a callable's name as its user knows it."""
    return str(getattr(target, "__qualname__", target))


def _target(node: Mapping[str, Any], key: str) -> Callable[..., Any]:
    """Callable that a node names."""
    path = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(path, str):
        raise ConfigError(f"{key or node}: needs a _target_, as in package.module.Name")
    target_key = _join(key, "_target_")
    target = locate(path, target_key)
    if not callable(target):
        raise ConfigError(f"{target_key}={path}: a {type(target).__name__} cannot be called")
    return typing.cast("Callable[..., Any]", target)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _flag(node: Mapping[str, Any], name: str, key: str, default: bool) -> bool:
    value = node.get(name, default)
    if not isinstance(value, bool):
        raise wrong(_join(key, name), value, "true or false")
    return value


def _positional(node: Mapping[str, Any], key: str, mode: _Mode) -> list[Any]:
    """Positional arguments of a node."""
    args = node.get("_args_", [])
    if not isinstance(args, list | tuple):
        raise wrong(_join(key, "_args_"), args, "a list")
    where = _join(key, "_args_")
    return [_argument(arg, f"{where}.{i}", mode) for i, arg in enumerate(args)]


def _argument(value: Any, key: str, mode: _Mode) -> Any:
    """Value of an argument: nodes inside are built, containers are converted."""
    return _built(value, key, mode) if mode.recursive else _converted(value, mode)


def _built(value: Any, key: str, mode: _Mode) -> Any:
    """Value with every node inside it built."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return _build(value, key, mode, {})
        mode = mode.of(value, key)
        return _converted({k: _built(v, f"{key}.{k}", mode) for k, v in value.items()}, mode)
    if isinstance(value, list | tuple):
        return _converted([_built(v, f"{key}.{i}", mode) for i, v in enumerate(value)], mode)
    return value


def _converted(value: Any, mode: _Mode) -> Any:
    """Container as the mode wants it: OmegaConf's for `none`, else plain."""
    if mode.convert != "none" or not isinstance(value, dict | list):
        return value
    from omegaconf import OmegaConf

    return OmegaConf.create(value, flags={"allow_objects": True})


def placed(text: str, key: str, keywords: Iterable[str]) -> str:
    """Return an error's text with the dotted key: `ranks=0: ...` becomes `launch.ranks=0: ...`."""
    if re.split("[=.:]", text, maxsplit=1)[0] in keywords:
        return f"{key}.{text}"
    return text if text.startswith(f"{key}.") else f"{key}: {text}"


def _is_wrong_call(
    error: Exception,
    target: Callable[..., Any],
    signature: inspect.Signature | None,
    keywords: Mapping[str, Any],
) -> bool:
    """Whether the arguments did not fit the callable, where only calling it could show that."""
    if not isinstance(error, TypeError) or signature is None:
        return isinstance(error, TypeError)
    called, _, complaint = str(error).partition("() ")
    if complaint.startswith(("missing ", "takes ")):
        return called in [getattr(each, "__qualname__", None) for each in _functions(target)]
    unexpected = _UNEXPECTED.search(complaint)
    return unexpected is not None and unexpected[1] in keywords


def _signature(target: Callable[..., Any]) -> inspect.Signature | None:
    """Signature of a callable, or None for the few built-in ones that have none.

    A decorator's `__wrapped__` is followed for the names of arguments, but it is the decorator that
    is called: its own `**kwargs` may take what the function inside does not, or add what it needs.
    """
    try:
        signature = inspect.signature(target)
        outer = inspect.signature(target, follow_wrapped=False)
    except (TypeError, ValueError):
        return None
    if signature != outer and not _takes_any(outer):
        return outer
    if _takes_any(signature) or not any(map(_has_variable_keywords, _functions(target))):
        return signature
    optional = [
        p if p.kind is p.VAR_POSITIONAL or p.default is not p.empty else p.replace(default=None)
        for p in signature.parameters.values()
    ]
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*optional, rest])


def _takes_any(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _functions(target: Any) -> Iterator[Any]:
    """Functions that run when a callable is called: decorators, and those that they wrap."""
    if isinstance(target, type):
        entries: list[Any] = [target.__init__, target.__new__, type(target).__call__]  # type: ignore[misc]
    else:
        entries = [target, type(target).__call__]
    for entry in entries:
        while entry is not None:
            entry = getattr(entry, "__func__", getattr(entry, "func", entry))
            yield entry
            entry = getattr(entry, "__wrapped__", None)


def _has_variable_keywords(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return bool(code and code.co_flags & inspect.CO_VARKEYWORDS)


def _check_arguments(
    target: Callable[..., Any],
    signature: inspect.Signature,
    args: list[Any],
    keywords: dict[str, Any],
    key: str,
) -> None:
    """Raise ConfigError for an argument that the callable does not take, or needs and lacks."""
    parameters = [*signature.parameters.values()]
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(args) > len(by_position) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        most = f"{name_of(target)} takes at most {len(by_position)} positional arguments"
        raise ConfigError(f"{_join(key, '_args_')}: {most}, not {len(args)}")
    taken = [p.name for p in by_position[: len(args)] if p.kind is not p.POSITIONAL_ONLY]
    takes = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name in keywords:
        if name in taken:
            raise ConfigError(f"{_join(key, name)}: given by _args_ already; leave one out")
        if name not in takes and not _takes_any(signature):
            hint = did_you_mean(name, takes)
            raise ConfigError(f"{_join(key, name)}: {name_of(target)} has no such keyword; {hint}")
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in (*keywords, *taken):
            raise ConfigError(f"{_join(key, name)}: expected a value, for {name_of(target)}")


def _with_numbers(target: Callable[..., Any], keywords: dict[str, Any], key: str) -> dict[str, Any]:
    """Keywords of something of ours, with text that is a number as that number.

    Raises ConfigError where it takes a number and gets another text, a list or null. Callables of
    others may be annotated in ways that they do not mean.
    """
    if not str(getattr(target, "__module__", "")).startswith("distrain."):
        return keywords
    made = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(made)
    except NameError:  # of a type that only the type checker imports
        return keywords
    checked = dict(keywords)
    for name, value in keywords.items():
        hint = hints.get(name)
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = set(typing.get_args(hint)) if is_union else {hint}
        is_optional = type(None) in kinds or name not in hints
        if not kinds - {type(None)} <= {int, float} or (value is None and is_optional):
            continue
        number = checked[name] = parsed_number(value)
        if not isinstance(number, int | float) or isinstance(number, bool):
            kind = "an integer" if float not in kinds else "a number"
            expected = kind + (", or null" if is_optional else "")
            raise wrong(_join(key, name), value, expected)
        if float not in kinds and isinstance(number, float) and not number.is_integer():
            raise wrong(_join(key, name), value, "an integer")
    return checked


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

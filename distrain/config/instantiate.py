"""Build objects from nodes: `_target_` and its keywords, with the semantics of Hydra's instantiate.

Configuration is trusted like code: `_target_` may name any importable callable.
"""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from typing_extensions import Unpack

from distrain.checks import did_you_mean, one_of, parsed_number, wrong
from distrain.config.import_path import locate, name_of
from distrain.errors import ConfigError, add_note

_SPECIAL_KEYS = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")
_T = TypeVar("_T")
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


@dataclass(frozen=True)
class _Mode:
    """Settings that inner nodes inherit, unless they have their own, and their context."""

    convert: str = "all"
    recursive: bool = True
    context: Mapping[str, Any] = field(default_factory=dict)

    def of(self, node: Mapping[str, Any], key: str) -> _Mode:
        """Return the mode of a node with its own `_convert_` and `_recursive_` applied."""
        convert = str(node.get("_convert_", self.convert)).lower()
        one_of(_join(key, "_convert_"), convert, ("none", "partial", "object", "all"))
        return _Mode(convert, _flag(node, "_recursive_", key, self.recursive), self.context)


def build(node: Mapping[str, Any], key: str = "", /, **context: Any) -> Any:
    """Return the object that `node["_target_"]` makes of the node's other keys.

    The special keys are those of `hydra.utils.instantiate`: `_args_` are positional arguments;
    `_partial_: true` returns a `functools.partial`; inner nodes are built first, unless
    `_recursive_: false` passes them as they are; `_convert_: none` passes lists and mappings as
    OmegaConf's. The default differs: plain lists and dicts (`all`).

    Args:
        node: `_target_` is the import path of any callable; the other keys are its keywords.
        key: dotted key of the node in the configuration, for error messages.
        context: keywords that are passed too if the callable's signature names them and the
            node does not.

    Raises:
        ConfigError: the path does not import, an argument is unknown or missing, or the callable
            raises ValueError.
    """
    return _build(node, key, _Mode(), context)


def build_nested(node: Mapping[str, Any], key: str = "", /, **context: Any) -> Any:
    """As `build`; inner nodes get the context too, as the schedules of a chain the optimizer."""
    return _build(node, key, _Mode(context=context), context)


def build_as(
    kind: Callable[..., _T], node: Mapping[str, Any], key: str, expected: str, /, **context: Any
) -> _T:
    """As `build`; ConfigError if the object is no instance of `kind`, as for `isinstance`."""
    built: _T = build(node, key, **context)
    # not type[_T]: mypy refuses abstract classes there
    if not isinstance(built, typing.cast("type", kind)):
        raise wrong(_join(key, "_target_"), node["_target_"], expected)
    return built


def _build(node: Mapping[str, Any], key: str, mode: _Mode, context: Mapping[str, Any]) -> Any:
    target = _target(node, key)
    mode = mode.of(node, key)
    args = _positional(node, key, mode)
    keywords = {
        name: _argument(value, _join(key, name), mode)
        for name, value in node.items()
        if name not in _SPECIAL_KEYS
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
            raise ConfigError(with_key(str(error), key or name_of(target), keywords)) from error
        add_note(error, f"while building {key or 'a node'}: {name_of(target)}")
        raise


def keywords_of(target: Callable[..., Any]) -> list[str] | None:
    """Return the names of a callable's arguments, or None if it takes any."""
    signature = _signature(target)
    return None if signature is None or _takes_any(signature) else [*signature.parameters]


def with_key(text: str, key: str, keywords: Iterable[str]) -> str:
    """Return an error's text with the dotted key: `ranks=0: ...` becomes `launch.ranks=0: ...`."""
    if re.split("[=.:]", text, maxsplit=1)[0] in keywords:
        return f"{key}.{text}"
    return text if text.startswith(f"{key}.") else f"{key}: {text}"


def _target(node: Mapping[str, Any], key: str) -> Callable[..., Any]:
    path = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(path, str):
        raise ConfigError(f"{key or node}: expected a _target_, as in package.module.Name")
    target_key = _join(key, "_target_")
    target = locate(path, target_key)
    if not callable(target):
        raise wrong(target_key, path, f"a callable; it is a {type(target).__name__}")
    return typing.cast("Callable[..., Any]", target)


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _flag(node: Mapping[str, Any], name: str, key: str, default: bool) -> bool:
    value = node.get(name, default)
    if not isinstance(value, bool):
        raise wrong(_join(key, name), value, "true or false")
    return value


def _positional(node: Mapping[str, Any], key: str, mode: _Mode) -> list[Any]:
    args, args_key = node.get("_args_", []), _join(key, "_args_")
    if not isinstance(args, list | tuple):
        raise wrong(args_key, args, "a list")
    return [_argument(arg, f"{args_key}.{i}", mode) for i, arg in enumerate(args)]


def _argument(value: Any, key: str, mode: _Mode) -> Any:
    return _built(value, key, mode) if mode.recursive else _converted(value, mode)


def _built(value: Any, key: str, mode: _Mode) -> Any:
    """Return the value with every inner node built."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return _build(value, key, mode, mode.context)
        mode = mode.of(value, key)
        return _converted({k: _built(v, f"{key}.{k}", mode) for k, v in value.items()}, mode)
    if isinstance(value, list | tuple):
        return _converted([_built(v, f"{key}.{i}", mode) for i, v in enumerate(value)], mode)
    return value


def _converted(value: Any, mode: _Mode) -> Any:
    """Return a container as OmegaConf's for `_convert_: none`, else as it is."""
    if mode.convert != "none" or not isinstance(value, dict | list):
        return value
    from omegaconf import OmegaConf

    return OmegaConf.create(value, flags={"allow_objects": True})


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
    """Return the signature of a callable; None for the few built-in ones that have none.

    A decorator's `__wrapped__` is followed for the names of arguments, but it is the decorator that
    is called: its own `**kwargs` may accept more than the wrapped function, or add to it.
    """
    try:
        signature = inspect.signature(target)
        outer = inspect.signature(target, follow_wrapped=False)
    except (TypeError, ValueError):
        return None
    if signature != outer and not _takes_any(outer):
        return outer
    *others, last = [None, *signature.parameters.values()]
    if last is not None and "Unpack[" in str(last.annotation):
        # `**keywords: Unpack[T]` takes the keys of the TypedDict T and no others (PEP 692)
        names = _hints(target).keys() - signature.parameters.keys() - {"return"}
        more = [inspect.Parameter(n, last.KEYWORD_ONLY, default=None) for n in sorted(names)]
        return signature.replace(parameters=[*filter(None, others), *more])
    if _takes_any(signature) or not any(map(_has_variable_keywords, _functions(target))):
        return signature
    optional = [
        p if p.kind is p.VAR_POSITIONAL or p.default is not p.empty else p.replace(default=None)
        for p in signature.parameters.values()
    ]
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*optional, rest])


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the types of a callable's arguments, the keys of an unpacked TypedDict included."""
    made = target.__init__ if isinstance(target, type) else target  # type: ignore[misc]
    try:
        hints = typing.get_type_hints(made)
    except NameError:  # of a type that only the type checker imports
        return {}
    for hint in [*hints.values()]:
        if typing.get_origin(hint) is Unpack:
            hints |= typing.get_type_hints(typing.get_args(hint)[0])
    return hints


def _takes_any(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _functions(target: Any) -> Iterator[Any]:
    """Yield the functions that run when a callable is called: decorators and the wrapped ones."""
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
    """Raise ConfigError for an unknown, a doubled or a missing argument."""
    parameters = [*signature.parameters.values()]
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(args) > len(by_position) and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        expected = f"at most {len(by_position)} positional arguments for {name_of(target)}"
        raise ConfigError(f"{_join(key, '_args_')}: expected {expected}, got {len(args)}")
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
    """Return the keywords of a callable of distrain, with text that is a number as that number.

    Callables of other packages may have annotations that are not meant strictly.

    Raises:
        ConfigError: it takes a number and gets another text, a list or null.
    """
    if not str(getattr(target, "__module__", "")).startswith("distrain."):
        return keywords
    hints = _hints(target)
    checked = dict(keywords)
    for name, value in keywords.items():
        hint = hints.get(name)
        is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        kinds = set(typing.get_args(hint)) if is_union else {hint}
        is_optional = type(None) in kinds
        if not kinds - {type(None)} <= {int, float} or (value is None and is_optional):
            continue
        number = checked[name] = parsed_number(value)
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        # an int above the largest float is no float
        is_whole = is_number and (isinstance(number, int) or number.is_integer())
        if float not in kinds and not is_whole:
            raise wrong(_join(key, name), value, "an integer" + ", or null" * is_optional)
        if not is_number:
            raise wrong(_join(key, name), value, "a number" + ", or null" * is_optional)
    return checked

"""Checks of values, and the errors that they raise: `key=value: expected X`, then the fix."""

from __future__ import annotations

import contextlib
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from distrain.errors import ConfigError

_MAX_LISTED = 12
_URL = re.compile(r"^([A-Za-z][\w+.-]+):/|\w://")


def wrong(key: str, value: object, expected: str) -> ConfigError:
    """Return the error `key=value: expected X`; a long value is cut."""
    return ConfigError(f"{key}={shown(value)}: expected {expected}")


def number(key: str, value: Any, *, above: float | None = None, least: float = 0.0) -> float:
    """Return `value` as a float; ConfigError unless it is finite and in its range.

    Args:
        key: name of the value in the error.
        value: int or float; bool and text are refused, also "1e-4" in quotes.
        above: exclusive lower limit; replaces `least`.
        least: inclusive lower limit.
    """
    limit = f">= {least:g}" if above is None else f"> {above:g}"
    if isinstance(value, str):
        raise ConfigError(f"{key}={value!r}: expected a finite number {limit}, without quotes")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        not is_number
        or not abs(value) <= sys.float_info.max  # math.isfinite raises for an int above it
        or (value < least if above is None else value <= above)
    ):
        raise wrong(key, value, f"a finite number {limit}")
    return float(value)


def whole(key: str, value: Any, *, least: int) -> int:
    """Return `value`; ConfigError unless it is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise wrong(key, value, f"an integer >= {least}")
    return value


def one_of(key: str, value: Any, choices: Sequence[str]) -> str:
    """Return `value`; ConfigError unless it is one of the choices."""
    if value not in choices:
        raise wrong(key, value, "one of " + ", ".join(choices))
    return str(value)


def refuse_url(key: str, path: object) -> None:
    """Raise ConfigError for `s3://...` and other URLs, which would become folders of that name.

    Args:
        key: name of the path in the error.
        path: a path-like object too, which has one slash left of two: `s3:/...`.
    """
    found = _URL.search(str(path))
    if found is not None:
        fix = "leave file:// out" if found[1].lower() == "file" else "mount the store, or copy"
        raise wrong(key, path, f"a path of a mounted file system; URLs are not supported: {fix}")


def did_you_mean(word: str, known: Iterable[str], *, most: int = 3) -> str:
    """Return a hint for a mistyped word: the known words spelled like it, else the known words.

    Args:
        word: as the user wrote it; upper and lower case are alike.
        known: correct words, in the order in which they are listed.
        most: number of suggestions.
    """
    words = {each.lower(): each for each in known}
    near = difflib.get_close_matches(word.lower(), words, n=most, cutoff=0.6)
    near = near or difflib.get_close_matches(word.lower(), words, n=most, cutoff=0.4)
    if near:
        return "did you mean " + " or ".join(words[each] for each in near) + "?"
    listed = [*words.values()][:_MAX_LISTED]
    more = ", ..." if len(words) > len(listed) else ""
    return "available: " + (", ".join(listed) or "none") + more


def parsed_number(value: Any) -> Any:
    """Return the number that a text stands for, as `${oc.env:LR}` gives one; else the value."""
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


def shown(value: object, *, most: int = 60) -> str:
    """Return a value as a user types it in YAML, cut to `most` characters."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def name_part(key: str, name: str) -> None:
    """Check that a name can be a part of a scalar's name.

    Raises:
        ConfigError: it is empty, or has a slash, control characters or outer blanks.
    """
    if not name.isprintable() or "/" in name or name != name.strip() or not name:
        raise ConfigError(f"{key}: expected a name without /, control characters and outer blanks")

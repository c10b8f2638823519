"""Rewrite arguments that Hydra's grammar refuses although their meaning is clear."""

from __future__ import annotations

import re
from collections.abc import Sequence

_GROUP_NULL = re.compile(r"(optim|schedule)=(null|~|None)")
_UNQUOTED = re.compile(r"([\w.@/+~]+)=([\w./:@%+-]+)")


def readable(argv: Sequence[str]) -> list[str]:
    """Return the arguments in the grammar of Hydra's overrides.

    - `schedule=null` and `optim=null` become `~schedule` and `~optim`: a group is left out so.
    - A value with letters beyond ASCII gets its quotes, as in `run.name='日本語'`.
    """
    return [_readable(argument) for argument in argv]


def _readable(argument: str) -> str:
    if found := _GROUP_NULL.fullmatch(argument):
        return f"~{found[1]}"
    found = _UNQUOTED.fullmatch(argument)
    if found and not argument.isascii() and found[1].isascii():
        return f"{found[1]}='{found[2]}'"
    return argument


def quoted(text: str) -> str:
    """Return a text as a quoted string of Hydra's grammar."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"

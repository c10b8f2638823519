"""Sweeps: folder names of their runs, and the exit code."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from distrain.errors import ExitCode
from distrain.redact import masked_overrides

_MAX_NAME = 120  # characters; file systems allow 255 bytes
_SEVERITY = (ExitCode.FINISHED, ExitCode.STOPPED, ExitCode.BAD_CONFIG, ExitCode.FAILED)


def sweep_name(hydra_conf: Any, argv: Sequence[str]) -> str:
    """Return the folder name of a run in its sweep, "" without a sweep.

    Example: `-m +experiment=digits optim.lr=0.1,0.2` gives `optim.lr=0.1` and `optim.lr=0.2`.
    """
    from hydra.types import RunMode

    if hydra_conf.mode != RunMode.MULTIRUN:
        return ""
    fixed = {key for each in argv if (key := _fixed_key(each))}
    overrides = [each.lstrip("+~") for each in hydra_conf.overrides.task]
    swept = [each for each in overrides if each.partition("=")[0] not in fixed]
    named = [each for each in swept if not each.startswith("run.")]
    return folder_name(",".join(named), shown=",".join(masked_overrides(named)))


def folder_name(text: str, *, shown: str | None = None) -> str:
    """Return a text as a folder name of letters, digits and `._=,+-`.

    A changed name ends in a hash of the text: "a/b=1" gives "a_b=1-5d0c5a". `shown` is the text
    with its secrets masked.
    """
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "_", text if shown is None else shown)
    name = name[:_MAX_NAME].lstrip(".-")
    if name == text:
        return name
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def worst(codes: Sequence[ExitCode]) -> ExitCode:
    """Return the most severe exit code of several runs; FINISHED for none."""
    return max(codes, key=_SEVERITY.index, default=ExitCode.FINISHED)


def _fixed_key(argument: str) -> str:
    """Return the key of an argument such as `a.b=1`; "" for `a.b=1,2` and others."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if argument.startswith("-") or "=" not in argument:
        return ""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return ""
    return "" if override.is_sweep_override() else override.get_key_element().lstrip("+~")

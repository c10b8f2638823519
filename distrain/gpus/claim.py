"""Claim: the run that holds GPUs or waits for them, in the files of leases and tickets as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distrain.process.inspect import owner

_MAX_BYTES = 64 << 10
_MAX_CHARACTERS = 500
_MAX_NUMBER = 2**40
_SILENT_S = 60.0  # a waiting run looks once per second


@dataclass(frozen=True)
class Claim:
    """A run that holds GPUs, or waits for some."""

    run: str = "?"  # its folder
    user: str = "?"
    pid: int = 0  # of the command
    since: float = 0.0  # seconds since 1970
    nice: bool = False  # whether it steps aside for others
    count: int = 0  # number of GPUs
    gpus: tuple[str, ...] = ()  # UUIDs: those held, or those of which it waits for `count`
    number: int = 0  # in the order of arrival; 0: it has not waited
    looked_s: float = 0.0  # last look of a waiting run, on the monotonic clock of the machine

    def intersects(self, other: Claim) -> bool:
        """Return whether a GPU is in both claims."""
        return not {*self.gpus}.isdisjoint(other.gpus)

    def is_silent(self) -> bool:
        """Return whether a waiting run has not looked for long: it is stopped (Ctrl-Z) or hangs."""
        # 0: it holds GPUs and does not look
        return 0.0 < self.looked_s < time.monotonic() - _SILENT_S

    def text(self) -> str:
        """Return a description: `alice (runs/digits, process 12, since 10:31, nice)`."""
        since = time.strftime("%b %d %H:%M", time.localtime(self.since))
        nice = ", nice" if self.nice else ""
        return f"{self.user} ({self.run}, process {self.pid}, since {since}{nice})"


def own_claim(run: str, gpus: Sequence[str], *, count: int, nice: bool) -> Claim:
    """Return a claim of this process, from now on."""
    user = owner(os.getpid())  # not by $USER, which su and containers leave as it was
    return Claim(run, user, os.getpid(), time.time(), nice, count, tuple(gpus))


def write(fd: int, claim: Claim) -> None:
    """Replace the content of a file by a claim."""
    text = json.dumps(dataclasses.asdict(claim)).encode()
    # in this order a full disk does not empty the file
    os.pwrite(fd, text, 0)
    os.ftruncate(fd, len(text))


def read(path: Path) -> Claim:
    """Return the claim in a file; fields that are missing or damaged have their defaults."""
    with path.open("rb") as file:
        text = file.read(_MAX_BYTES)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        fields = {}
    if not isinstance(fields, dict):
        return Claim()
    # any user can write the file: types are checked, control characters replaced
    checked = {
        field.name: _checked(fields[field.name], type(field.default))
        for field in dataclasses.fields(Claim)
        if field.name in fields
    }
    return Claim(**{name: value for name, value in checked.items() if value is not None})


def _checked(value: Any, kind: type) -> Any:
    """Return a value checked to be of a kind; None if it is not."""
    if kind is str:
        return _printable(value)
    if kind is tuple:
        return tuple(map(_printable, value)) if isinstance(value, list) else None
    if kind is bool:
        return value if isinstance(value, bool) else None
    is_number = type(value) is int or (kind is float and type(value) is float)
    return kind(value) if is_number and 0 <= value < _MAX_NUMBER else None


def _printable(value: object) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(value)[:_MAX_CHARACTERS])

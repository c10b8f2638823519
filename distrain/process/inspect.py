"""Processes of this machine, as far as they are seen from here (a container sees its own)."""

from __future__ import annotations

import contextlib
import glob
import os
import pwd


def owner(pid: int) -> str:
    """Return the user of a process; "" if it is not seen."""
    try:
        uid = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return ""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def command(pid: int) -> str:
    """Return the name of a process's program; "" if it is not seen."""
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def is_of(pid: int, ancestor: int) -> bool:
    """Return whether a process is the given one, or a descendant of it."""
    while pid > 1 and pid != ancestor:
        pid = stat(pid)[1]
    return pid == ancestor


def stat(pid: int) -> tuple[str, int]:
    """Return the state of a process, as one letter, and its parent; "" and 0 if it is not seen."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            state, parent, *_ = file.read().rpartition(")")[2].split()
            return state, int(parent)
    except (OSError, ValueError):
        return "", 0


def children(pid: int) -> list[int]:
    """Return the children of a process; none if it is not seen."""
    found: list[int] = []
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with contextlib.suppress(OSError), open(path) as file:
            found += map(int, file.read().split())
    return found


def waits_in(pid: int) -> str:
    """Return the function of the kernel that a process waits in; "" if it waits in none."""
    try:
        with open(f"/proc/{pid}/wchan") as file:
            function = file.read().strip()
    except OSError:
        return ""
    return "" if function == "0" else function

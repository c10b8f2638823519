"""Limit on open files: gloo connects each rank with every other one, once per group."""

from __future__ import annotations

import contextlib
import os
import resource

from distrain.errors import ConfigError

_NUM_GROUPS = 2  # of the gradients, and of the scalars
_IN_AGENT = 8  # files per rank in its agent: pipes, heartbeat, sockets
_RESERVE = 16  # files opened meanwhile: listening sockets, libraries, logs


def raise_limit() -> None:
    """Raise this process's soft limit on open files to the hard one, also for its children."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_agent(ranks: int, *, world_size: int) -> None:
    """Raise ConfigError if this process cannot watch its ranks, or a rank not reach all others."""
    files = f"the agent opens up to {_IN_AGENT} files and pipes of each"
    _check(_IN_AGENT * ranks, f"{ranks} ranks ({files})")
    check_mesh(world_size)


def check_mesh(ranks: int) -> None:
    """Raise ConfigError if this process cannot open the sockets of a mesh; gloo would abort."""
    _check(
        _NUM_GROUPS * (ranks - 1),
        f"{ranks} ranks ({_NUM_GROUPS} sockets per rank to each other one)",
    )


def _check(num_files: int, purpose: str) -> None:
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    needed = len(os.listdir("/proc/self/fd")) + num_files + _RESERVE
    if needed > limit:
        raise ConfigError(
            f"ulimit -n {limit}: expected at least {needed} for {purpose}; raise the hard limit "
            f"(ulimit -Hn is {hard}), or start fewer ranks"
        )

"""The limit on open files: gloo connects each rank with every other one, once per group."""

from __future__ import annotations

import contextlib
import os
import resource

from distrain.errors import ConfigError

_GROUPS = 2  # that of the gradients, and that of the scalars
_RESERVE = 16  # files that a rank opens meanwhile: listening sockets, libraries, logs


def raise_limit() -> None:
    """Raise this process's soft limit on open files to the hard one; its children inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def check_mesh(ranks: int) -> None:
    """Check that this process can open the sockets of a full mesh, before gloo aborts without them.

    Args:
        ranks: of the process group.

    Raises:
        ConfigError: the limit is too low; names the limit and the ranks.
    """
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    needed = len(os.listdir("/proc/self/fd")) + _GROUPS * (ranks - 1) + _RESERVE
    if needed > limit:
        raise ConfigError(
            f"ulimit -n {limit}: expected at least {needed} for {ranks} ranks ({_GROUPS} sockets "
            f"per rank to each other one); raise the hard limit (ulimit -Hn is {hard}), or start "
            "fewer ranks"
        )

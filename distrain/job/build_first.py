"""Build data sets on one rank per node first, where building downloads or unpacks files."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from distrain import heartbeat
from distrain.distributed.ranks import Topology, default_store
from distrain.errors import ConfigError, RunFailed
from distrain.heartbeat import Phase
from distrain.log import logger
from distrain.process.environment import restart_count

T = TypeVar("T")

_POLL_S = 0.1


def build_first(build: Callable[[], T], ranks: Topology) -> T:
    """Return what `build` returns: on the first rank of each node, then on its other ranks.

    Waiting has no limit: a download may take hours.

    Raises:
        Exception: on the first rank, that of `build`.
        ConfigError, RunFailed: on the others, with its text, if it failed there.
    """
    store = default_store()
    if store is None:
        return build()
    first = ranks.rank - ranks.local_rank
    key = f"build_first/{restart_count()}/{first}"
    if ranks.local_rank == 0:
        failure = ""
        try:
            return build()
        except Exception as error:
            kind = "config" if isinstance(error, ConfigError) else "other"
            failure = f"{kind} {type(error).__name__}: {error}"
            raise
        finally:
            store.set(key, failure)
    logger.info("data.build_first: waiting until rank %d has built the data sets", first)
    while not store.check([key]):
        heartbeat.current().beat(Phase.START)
        time.sleep(_POLL_S)
    kind, _, failure = store.get(key).decode().partition(" ")
    if failure:
        raise (ConfigError if kind == "config" else RunFailed)(
            f"data: building it failed on rank {first}: {failure}"
        )
    return build()

"""Read a run.yaml of an unknown author: bounded size, depth and number of values."""

from __future__ import annotations

from typing import Any

import yaml

MAX_BYTES = 4 << 20
_MAX_DEPTH = 100
_MAX_NODES = 200_000

_Loader: type[Any] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C: 1 ms per run, not 10


def load_mapping(data: bytes) -> dict[str, Any]:
    """Return the mapping in a YAML document.

    Raises:
        ValueError: it is no mapping, or too large; an alias counts as the values it repeats.
        yaml.YAMLError: it is no YAML.
    """
    # the composer of libyaml recurses in C without a limit, and merge keys (<<) multiply
    depth = 0
    for event in yaml.parse(data, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(f"more than {_MAX_DEPTH} levels deep")
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and event.value == "<<":
            raise ValueError("a merge key (<<), which no frozen configuration has")
    conf = yaml.load(data, _Loader)
    if not isinstance(conf, dict):
        raise ValueError("no mapping")
    pending: list[Any] = [conf]
    for _ in range(_MAX_NODES):
        if not pending:
            return conf
        node = pending.pop()
        if isinstance(node, dict):
            pending += node.values()
        elif isinstance(node, list | tuple | set):
            pending += node
    raise ValueError(f"more than {_MAX_NODES} values, aliases included")

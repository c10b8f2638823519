"""Exchange new scalar names between ranks through the key-value store of the process group."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from distrain.events.pending import ScalarKind

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_instances = itertools.count()


class NameExchange:
    """New names of all ranks. Every rank creates the same number of these, in the same order."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._prefix = f"distrain/names/{next(_instances)}"
        self._num_read = 0

    def _key(self, *parts: object) -> str:
        return "/".join([self._prefix, str(self._num_read), *map(str, parts)])

    def publish(self, kinds: Mapping[str, ScalarKind]) -> None:
        """Publish this rank's new names; equal lists of several ranks are stored once."""
        text = json.dumps(kinds, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        if self._store.add(self._key(digest), 1) == 1:
            slot = self._store.add(self._key("num"), 1)
            self._store.set(self._key("list", slot), text)

    def read(self) -> dict[str, ScalarKind]:
        """Return the names that any rank published since the last `read`.

        Called by all ranks after a collective that each entered after its `publish`, so all lists
        are stored and all ranks read the same.

        Raises:
            ValueError: two ranks put one name with different settings.
        """
        found: dict[str, ScalarKind] = {}
        for slot in range(1, self._store.add(self._key("num"), 0) + 1):
            for name, fields in json.loads(self._store.get(self._key("list", slot))).items():
                kind = ScalarKind(*fields)
                if found.setdefault(name, kind) != kind:
                    raise ValueError(f"{name}: one rank put it as {kind}, another as {found[name]}")
        self._num_read += 1
        return found

"""Handover: rank 0 sends the run folder to other ranks that another program has started.

Each of these processes resolves the configuration itself, and a resolver such as `${now:}` gives
each another run folder. Only names are sent, never import paths: any user of the machine can
connect to the store.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from distrain.errors import RankFailed
from distrain.process.environment import env_int

_KEY = "distrain/run"
_READERS = "distrain/run/readers"
_LINGER_S = 10.0  # rank 0 may serve the store, which ends with it


class Handover:
    """One message from rank 0 to all other ranks, through the store at MASTER_ADDR:MASTER_PORT.

    torchrun's agent serves that store; otherwise rank 0 does, and torch's process group uses it
    later. With one rank nothing is sent.
    """

    def __init__(self, env: Mapping[str, str], *, timeout_s: float = 600.0) -> None:
        self._rank, self._world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        self._address = env["MASTER_ADDR"], int(env["MASTER_PORT"])
        self._timeout_s = timeout_s
        self._prefix = f"{env_int('TORCHELASTIC_RESTART_COUNT')}/"
        self._is_sent = False
        self._store: Any = None  # kept: rank 0 may serve it until the end

    def send(self, message: Mapping[str, Any], *, is_last: bool = False) -> None:
        """Send a message, as rank 0; a second one is dropped. RankFailed if that is impossible.

        With `is_last` this process ends now: wait up to _LINGER_S until the others have read it.
        """
        if self._is_sent or self._world_size == 1:
            return
        self._is_sent = True
        store = self._connect()
        store.set(self._prefix + _KEY, json.dumps(dict(message)))
        deadline = time.monotonic() + (_LINGER_S if is_last else 0.0)
        while time.monotonic() < deadline:
            if store.add(self._prefix + _READERS, 0) == self._world_size - 1:
                return
            time.sleep(0.1)

    def receive(self) -> dict[str, Any]:
        """Return the message of rank 0; RankFailed if there is none, or rank 0 has ended."""
        store = self._connect()
        try:
            message: dict[str, Any] = json.loads(store.get(self._prefix + _KEY))
            store.add(self._prefix + _READERS, 1)
        except RuntimeError as error:
            raise self._failed(error) from error
        return message

    def _connect(self) -> Any:
        from torch._C._distributed_c10d import TCPStore

        is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        host, port = self._address
        try:
            self._store = TCPStore(
                host,
                port,
                is_master=self._rank == 0 and not is_agents,
                timeout=timedelta(seconds=self._timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError as error:
            raise self._failed(error) from error
        return self._store

    def _failed(self, error: Exception) -> RankFailed:
        host, port = self._address
        why = str(error).splitlines()[0]
        return RankFailed(
            f"MASTER_ADDR={host} MASTER_PORT={port}: rank 0 and rank {self._rank} do not meet "
            f"there: {why}"
        )

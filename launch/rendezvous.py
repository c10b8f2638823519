"""Rendezvous of a fixed set of node agents over a TCPStore."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from distrain.errors import RankFailed
from distrain.launch.failure import Failure

_POLL_S = 0.5  # between two looks at the other nodes
_FIRST_PAUSE_S = 0.02  # of a wait, whose pauses grow up to _POLL_S
_EXCHANGE_S = 8.0  # a node needs up to SURVIVOR_S to find out how its ranks failed
_BACKLOG = 4096  # all ranks connect at the same moment


def listen(address: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """Return a socket that listens on one address of this machine, by default on a free port."""
    # A store takes the socket over: no other process can take the port in between, and only this
    # address is open, where torch's store alone would listen on all.
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, port))
    listener.listen(_BACKLOG)
    return listener


class StaticRendezvous(RendezvousHandler):
    """torch's rendezvous for a number of agents that is known from the start.

    Each round is an attempt: all nodes meet and run their ranks, and a failure on one node ends the
    round on all. The ranks of each round get a new store: an old one holds addresses of dead ranks.

    Args:
        nodes: number of agents.
        node_rank: of this one.
        endpoint: a listening socket on node 0, "host:port" on the others; None on a single node.
        run_id: equal on all nodes, different for each run.
        join_s: seconds to wait for the other nodes.
    """

    def __init__(
        self,
        *,
        nodes: int = 1,
        node_rank: int = 0,
        endpoint: socket.socket | str | None = None,
        run_id: str = "distrain",
        join_s: float = 600.0,
    ) -> None:
        self.num_nodes = nodes
        self._node_rank = node_rank
        self._endpoint = endpoint
        self._run_id = run_id
        self._join_s = join_s
        self._host = "127.0.0.1"
        self._agents: Store | None = None
        self._ranks: TCPStore | None = None  # of this round, on node 0
        self._store: Any = None  # of the agents in this round
        self._round = 0
        self._next_look_s = 0.0

    @property
    def use_agent_store(self) -> bool:
        """True: ranks connect to the store at their address, and serve none."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other agents for a new round; RankFailed if they do not come in time."""
        if self._agents is None:
            self._agents = self._connect()
        self._round += 1
        self._store = PrefixStore(f"{self._run_id}/{self._round}", self._agents)
        if self._node_rank == 0:
            self._store.set("port", str(self._serve_ranks()))
        self._store.add("arrived", 1)
        if not _wait(lambda: self._store.add("arrived", 0) >= self.num_nodes, self._join_s):
            arrived = self._store.add("arrived", 0)
            raise RankFailed(
                f"{arrived} of {self.num_nodes} nodes came in {self._join_s:g} s; see the logs of "
                "the others"
            )
        address = RendezvousStoreInfo(self._host, int(self._store.get("port")))
        return RendezvousInfo(self._store, self._node_rank, self.num_nodes, address)

    def peer_failed(self) -> bool:
        """Return whether a node has signalled a failure in this round; polls every _POLL_S."""
        if self.num_nodes == 1 or time.monotonic() < self._next_look_s:
            return False
        self._next_look_s = time.monotonic() + _POLL_S
        try:
            return bool(self._store.check(["failed"]))
        except RuntimeError:  # the first node is lost
            return True

    def signal_failure(self) -> None:
        """Signal to the other nodes that this round has failed."""
        if self.num_nodes > 1:
            with contextlib.suppress(RuntimeError):
                self._store.set("failed", str(self._node_rank))

    def exchange(self, failures: list[Failure]) -> list[Failure]:
        """Send the failures of this node's ranks to the other nodes; return theirs.

        Nodes silent for _EXCHANGE_S are left out; without the first node the result is [].
        """
        if self.num_nodes == 1:
            return []
        mine = json.dumps([dataclasses.asdict(each) for each in failures])
        keys = [f"failures/{node}" for node in self._others()]
        try:
            self._store.set(f"failures/{self._node_rank}", mine)
            _wait(lambda: self._store.check(keys), _EXCHANGE_S)
            received = [self._store.get(key) for key in keys if self._store.check([key])]
            self._store.add("received", 1)
            if self._node_rank == 0:  # the store ends with this process
                _wait(lambda: self._store.add("received", 0) > len(received), _EXCHANGE_S)
        except RuntimeError:
            return []
        return [Failure(**each) for text in received for each in json.loads(text)]

    def publish(self, topic: str, message: str) -> None:
        """Replace this node's message on a topic of this round."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{topic}/{self._node_rank}", message)

    def latest(self, topic: str) -> dict[int, str]:
        """Return each other node's last message on a topic of this round; "" without one."""
        messages = dict.fromkeys(self._others(), "")
        with contextlib.suppress(RuntimeError):
            for node in messages:
                if self._store.check([f"{topic}/{node}"]):
                    messages[node] = self._store.get(f"{topic}/{node}").decode()
        return messages

    def get_backend(self) -> str:
        return "distrain"

    def get_run_id(self) -> str:
        return self._run_id

    def num_nodes_waiting(self) -> int:
        return 0  # no node joins later

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Do nothing: the store ends with its process."""

    def shutdown(self) -> bool:
        return True  # likewise

    def _others(self) -> list[int]:
        return [node for node in range(self.num_nodes) if node != self._node_rank]

    def _connect(self) -> Store:
        """Return the store of the agents: served on node 0, else connected to."""
        if self.num_nodes == 1:
            return HashStore()
        if isinstance(self._endpoint, socket.socket):
            self._host, port = self._endpoint.getsockname()[:2]
            return _serve(self._endpoint, self._join_s)
        assert self._endpoint is not None
        host, _, port = self._endpoint.rpartition(":")
        self._host = host.strip("[]")
        timeout = timedelta(seconds=self._join_s)
        return TCPStore(self._host, int(port), is_master=False, timeout=timeout)

    def _serve_ranks(self) -> int:
        """Serve the store of this round's ranks; return its port."""
        listener = listen(self._host)
        port: int = listener.getsockname()[1]
        self._ranks = _serve(listener, self._join_s)
        return port


def _serve(listener: socket.socket, timeout_s: float) -> TCPStore:
    """Return a store that serves at a listening socket, and owns it."""
    host, port = listener.getsockname()[:2]
    return TCPStore(
        host,
        port,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),
    )


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Poll until a condition holds, with signals handled in between; return whether it does."""
    deadline, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(_POLL_S, pause_s * 1.5)  # one node answers all others
    return True

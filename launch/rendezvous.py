"""Where the agents of all nodes meet, and the store in which their ranks will meet."""

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

_POLL_S = 0.5  # from one look at the other nodes to the next
_FIRST_PAUSE_S = 0.02  # of a wait, whose pauses grow up to _POLL_S
_EXCHANGE_S = 8.0  # a node needs up to SURVIVOR_S to know how its ranks failed
_BACKLOG = 4096  # ranks connect at the same moment


def listen(address: str = "127.0.0.1", port: int = 0) -> socket.socket:
    """Return a socket that listens on a free port of one address of this machine.

    A store takes the socket over, so nobody else can get the port in between, and only that address
    is open: by itself torch's store listens on all of them.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind((address, port))
    listener.listen(_BACKLOG)
    return listener


class Meeting(RendezvousHandler):
    """torch's rendezvous of agents whose number is known from the start.

    Each round is an attempt: all nodes meet, run their ranks, and a failure on one node ends the
    round on all of them. The ranks of each round have a new store: an old one would lead them to
    ranks that have died.

    Args:
        nodes: how many agents there are.
        node_rank: of this one.
        endpoint: a listening socket on node 0, "host:port" on the others; None on a single node.
        run_id: equal on all nodes, and another for another run.
        join_s: how long a node waits for the others.
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
        self._nodes = nodes
        self._node_rank = node_rank
        self._endpoint = endpoint
        self._run_id = run_id
        self._join_s = join_s
        self._host = "127.0.0.1"
        self._agents: Store | None = None
        self._ranks: TCPStore | None = None  # of this round, on node 0
        self._store: Any = None  # of the agents in this round
        self._round = 0
        self._next_look = 0.0

    @property
    def use_agent_store(self) -> bool:
        """True: a rank finds the store that the address names, and makes none."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Meet the other agents for a new round.

        Raises:
            RankFailed: they did not come in time.
        """
        if self._agents is None:
            self._agents = self._connect()
        self._round += 1
        self._store = PrefixStore(f"{self._run_id}/{self._round}", self._agents)
        if self._node_rank == 0:
            self._store.set("port", str(self._serve_ranks()))
        self._store.add("arrived", 1)
        if not _wait(lambda: self._store.add("arrived", 0) >= self._nodes, self._join_s):
            arrived = self._store.add("arrived", 0)
            raise RankFailed(
                f"{arrived} of {self._nodes} nodes came in {self._join_s:g} s; see the logs of "
                "the others"
            )
        address = RendezvousStoreInfo(self._host, int(self._store.get("port")))
        return RendezvousInfo(self._store, self._node_rank, self._nodes, address)

    def someone_failed(self) -> bool:
        """Say whether a node has told a failure in this round; looks now and then only."""
        if self._nodes == 1 or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + _POLL_S
        try:
            return bool(self._store.check(["failed"]))
        except RuntimeError:  # the first node is gone
            return True

    def tell_failure(self) -> None:
        """Tell the other nodes that this round has failed."""
        if self._nodes > 1:
            with contextlib.suppress(RuntimeError):
                self._store.set("failed", str(self._node_rank))

    def exchange(self, failures: list[Failure]) -> list[Failure]:
        """Tell the other nodes how this one's ranks failed; return how theirs did.

        A node that is silent for too long is left out; without the first node nobody can tell.
        """
        if self._nodes == 1:
            return []
        mine = json.dumps([dataclasses.asdict(each) for each in failures])
        others = [node for node in range(self._nodes) if node != self._node_rank]
        keys = [f"failures/{node}" for node in others]
        try:
            self._store.set(f"failures/{self._node_rank}", mine)
            _wait(lambda: self._store.check(keys), _EXCHANGE_S)
            there = [self._store.get(key) for key in keys if self._store.check([key])]
            self._store.add("heard", 1)
            if self._node_rank == 0:  # the store ends with us
                _wait(lambda: self._store.add("heard", 0) > len(there), _EXCHANGE_S)
        except RuntimeError:
            return []
        return [Failure(**each) for text in there for each in json.loads(text)]

    @property
    def num_nodes(self) -> int:
        """How many agents there are."""
        return self._nodes

    def tell(self, topic: str, word: str) -> None:
        """Tell the other nodes something new on a topic of this round."""
        with contextlib.suppress(RuntimeError):
            self._store.set(f"{topic}/{self._node_rank}", word)

    def hear(self, topic: str) -> dict[int, str]:
        """Return the last word of each other node on a topic of this round; "" without one."""
        others = [node for node in range(self._nodes) if node != self._node_rank]
        words = dict.fromkeys(others, "")
        with contextlib.suppress(RuntimeError):
            for node in others:
                if self._store.check([f"{topic}/{node}"]):
                    words[node] = self._store.get(f"{topic}/{node}").decode()
        return words

    def get_backend(self) -> str:
        """Return a name."""
        return "distrain"

    def get_run_id(self) -> str:
        """Return the run's id."""
        return self._run_id

    def num_nodes_waiting(self) -> int:
        """Return 0: there are never more nodes than at the start."""
        return 0

    def is_closed(self) -> bool:
        """Return False."""
        return False

    def set_closed(self) -> None:
        """Do nothing: the store ends with its process."""

    def shutdown(self) -> bool:
        """Return True: the store ends with its process."""
        return True

    def _connect(self) -> Store:
        """Open the store of the agents, or connect to it."""
        if self._nodes == 1:
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
        """Open the store of this round's ranks; return its port."""
        listener = listen(self._host)
        port: int = listener.getsockname()[1]
        self._ranks = _serve(listener, self._join_s)
        return port


def _serve(listener: socket.socket, timeout_s: float) -> TCPStore:
    """Return a store that serves at a listening socket, which becomes the store's own."""
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
    """Wait until a condition holds, with signals heard in between; say whether it does."""
    deadline, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
        pause_s = min(_POLL_S, pause_s * 1.5)  # one node answers all others
    return True

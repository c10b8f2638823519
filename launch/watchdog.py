"""Hang detection: kill a stalled run; report rank, phase and stacks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from distrain import heartbeat
from distrain.files.temp_folder import TemporaryFolder
from distrain.launch.failure import Failure
from distrain.launch.rank import append, log_path
from distrain.launch.rendezvous import StaticRendezvous
from distrain.launch.stall import Place, Progress, ended_early, least_advanced, report
from distrain.process.inspect import children, command, stat, waits_in

_CHECK_S = 0.5  # between two checks of the heartbeats
_PUBLISH_S = 2.0  # between two messages to the other nodes
_STACKS_S = 1.0  # a running rank writes its stacks in far less
_NODE_TIMEOUT_S = 10.0  # a node silent for longer is not waited for
_MAX_TRACE_BYTES = 16_000


class Watchdog:
    """Watches the ranks of this node by their heartbeats; a limit of 0 disables it."""

    def __init__(
        self, watchdog_s: float | None, *, log_dir: Path, rendezvous: StaticRendezvous
    ) -> None:
        self._watchdog_s = watchdog_s
        self._log_dir = log_dir
        self._rendezvous = rendezvous
        self._folder: TemporaryFolder | None = None
        self._files: dict[int, int] = {}  # descriptors by rank
        self._progress = Progress((), watchdog_s=watchdog_s)
        self._ended_early: set[int] = set()  # ranks, at the last check
        self._next_check_s = self._next_publish_s = 0.0
        self._messages: dict[int, tuple[str, float]] = {}  # of other nodes, with time of arrival

    def add_files(self, envs: Iterable[dict[str, str]]) -> None:
        """Make a heartbeat file for each rank of a new attempt; add its path to the environment."""
        self.close()
        if self._watchdog_s == 0:
            return
        # in memory where possible: a heartbeat must not wait for a disk
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._folder = TemporaryFolder(f"beats-{os.getpid()}-", parent=memory)
        for env in envs:
            path = os.path.join(self._folder.path, f"rank_{env['RANK']}")
            self._files[int(env["RANK"])] = file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.truncate(file, heartbeat.NUM_BYTES)
            env[heartbeat.VARIABLE] = path
        self._progress = Progress(self._files, watchdog_s=self._watchdog_s)

    def close(self) -> None:
        """Close the files; ranks that live can still write to them."""
        for file in self._files.values():
            os.close(file)
        self._files, self._messages, self._ended_early = {}, {}, set()
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def check(self, pids: Mapping[int, int]) -> Failure | None:
        """Return the failure of ranks that stall, or have left early; checks every _CHECK_S.

        Args:
            pids: processes of this node's ranks, by rank.
        """
        now_s = time.monotonic()
        if not self._files or now_s < self._next_check_s:
            return None
        self._next_check_s = now_s + _CHECK_S
        beats = {rank: heartbeat.read(file) for rank, file in self._files.items()}
        self._progress.update(beats, now_s)
        places = self._progress.places(lambda rank: stat(pids[rank])[0])
        self._publish(places, now_s)
        left = self._left_early(places)
        if left is not None:
            return left
        stuck = least_advanced(places)
        if not stuck or not all(place.is_overdue for place in stuck):
            return None
        others = [place for place in places if place not in stuck]
        silent = list[int]()
        if self._rendezvous.num_nodes > 1:
            remote, silent = self._remote_places(now_s)
            if _is_waiting_for_other_node(stuck, remote):
                return None
            others += [place for of_node in remote.values() for place in of_node]
        text = report(stuck, others)
        for node in silent:
            text += f"; the agent of node {node} is silent"
        trace = self._dump_stacks(pids, text)[stuck[0].rank]
        rank = stuck[0].rank if len(stuck) == 1 else -1
        log = str(self._log_dir) if rank < 0 else log_path(self._log_dir, rank)
        return Failure(rank, "hang", text, trace, log, time.time(), of_peer=bool(silent))

    def _left_early(self, places: list[Place]) -> Failure | None:
        """Return the failure of a rank whose job returned while others have iterations to do.

        Its process keeps its connections open, so the other ranks would wait for it. One check may
        read half a beat, so it takes two.
        """
        early = {place.rank: place for place in ended_early(places) if place.finished}
        confirmed = sorted(early.keys() & self._ended_early)
        self._ended_early = set(early)
        if not confirmed:
            return None
        rank = confirmed[0]
        text = f"its job returned early, after {early[rank].iteration} iterations"
        return Failure(rank, "exit", text, log=log_path(self._log_dir, rank), time_s=time.time())

    def _publish(self, places: list[Place], now_s: float) -> None:
        """Publish the places of this node's ranks to the other nodes."""
        if self._rendezvous.num_nodes > 1 and now_s >= self._next_publish_s:
            self._next_publish_s = now_s + _PUBLISH_S
            self._rendezvous.publish("places", json.dumps([now_s, places]))

    def _remote_places(self, now_s: float) -> tuple[dict[int, list[Place]], list[int]]:
        """Return the places of the ranks on other nodes, and the silent nodes."""
        remote, silent = dict[int, list[Place]](), list[int]()
        for node, message in self._rendezvous.latest("places").items():
            if node not in self._messages or self._messages[node][0] != message:
                self._messages[node] = message, now_s
            if now_s - self._messages[node][1] > _NODE_TIMEOUT_S:
                silent.append(node)
            else:
                remote[node] = [Place(*p) for p in json.loads(message)[1]] if message else []
        return remote, silent

    def _dump_stacks(self, pids: Mapping[int, int], why: str) -> dict[int, str]:
        """Have all ranks write their stacks to their logs; return them by rank.

        The states of a rank's own processes follow: it may wait for a loader process.
        """
        logs = {rank: log_path(self._log_dir, rank) for rank in pids}
        sizes = {}
        for rank, pid in pids.items():
            append(logs[rank], f"distrain: the stacks of rank {rank}, because {why}\n")
            sizes[rank] = os.path.getsize(logs[rank])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(_STACKS_S)
        stacks = {}
        for rank, log in logs.items():
            with open(log, "rb") as file:
                file.seek(sizes[rank])
                stack = file.read(_MAX_TRACE_BYTES).decode(errors="replace").strip()
            stacks[rank] = f"stack of rank {rank}:\n{stack}"
            if not stack:
                stacks[rank] = f"rank {rank} did not answer when it was asked for its stacks"
                append(log, stacks[rank] + "\n")
            if states := _states_of_children(pids[rank]):
                stacks[rank] += "\n" + states
                append(log, states + "\n")
        return stacks


def _states_of_children(pid: int) -> str:
    """Return a line per child of a process: its program, its state and what it waits in."""
    return "\n".join(
        f"its process {child} ({command(child)}): state {stat(child)[0] or '?'}"
        + (f", in {where}" if (where := waits_in(child)) else "")
        for child in children(pid)
    )


def _is_waiting_for_other_node(stuck: list[Place], remote: Mapping[int, list[Place]]) -> bool:
    """Return whether a rank of another node is behind, or as far and not overdue yet."""
    for places in remote.values():
        for place in least_advanced(places):
            is_equal = place.order == stuck[0].order
            if place.order < stuck[0].order or (is_equal and not place.is_overdue):
                return True
    return False

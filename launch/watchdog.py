"""The agent's watch over its ranks: a run that stands still ends, and says where it stood."""

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
from distrain.launch.rendezvous import Meeting
from distrain.launch.stall import Place, Progress, ended_early, hindmost, report

_LOOK_S = 0.5  # from one look at the beats to the next
_TELL_S = 2.0  # from one word to the other nodes to the next
_ANSWER_S = 1.0  # a rank that runs writes its stacks in far less
_DEAF_S = 10.0  # a node that has said nothing for so long excuses nobody
_TRACE_BYTES = 16_000


class Watchdog:
    """Watches the ranks of this node by their beats.

    Args:
        watchdog_s: how long a rank may make no progress, see `Progress`; 0 watches nothing.
        log_dir: folder of the logs, to which the stacks of ranks that stand still go.
        meeting: the agents of all nodes.
    """

    def __init__(self, watchdog_s: float | None, *, log_dir: Path, meeting: Meeting) -> None:
        self._watchdog_s = watchdog_s
        self._log_dir = log_dir
        self._meeting = meeting
        self._folder: TemporaryFolder | None = None
        self._files: dict[int, int] = {}  # descriptors by rank
        self._progress = Progress((), watchdog_s=watchdog_s)
        self._gone: set[int] = set()  # ranks that seemed to have left early at the last look
        self._next_look_s = self._next_tell_s = 0.0
        self._words: dict[int, tuple[str, float]] = {}  # of other nodes: what, and since when

    def hand_out(self, envs: Iterable[dict[str, str]]) -> None:
        """Give each rank of a new attempt its file, by its environment."""
        self.close()
        if self._watchdog_s == 0:
            return
        # in memory where there is such a folder: a rank must not wait for a disk to beat
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self._folder = TemporaryFolder(f"beats-{os.getpid()}-", parent=memory)
        for env in envs:
            path = os.path.join(self._folder.path, f"rank_{env['RANK']}")
            self._files[int(env["RANK"])] = file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            os.truncate(file, heartbeat.NUM_BYTES)
            env[heartbeat.VARIABLE] = path
        self._progress = Progress(self._files, watchdog_s=self._watchdog_s)

    def close(self) -> None:
        """Let go of the files; ranks that live can go on beating."""
        for file in self._files.values():
            os.close(file)
        self._files, self._words, self._gone = {}, {}, set()
        if self._folder is not None:
            self._folder.close()
            self._folder = None

    def look(self, pids: Mapping[int, int]) -> Failure | None:
        """Return the failure of ranks that make no progress, or have left; looks now and then only.

        Args:
            pids: processes of this node's ranks, by rank.
        """
        now_s = time.monotonic()
        if not self._files or now_s < self._next_look_s:
            return None
        self._next_look_s = now_s + _LOOK_S
        beats = {rank: heartbeat.read(file) for rank, file in self._files.items()}
        self._progress.see(beats, now_s)
        places = self._progress.places(lambda rank: _state(pids[rank]))
        self._tell(places, now_s)
        early = self._left_early(places)
        if early is not None:
            return early
        stuck = hindmost(places)
        if not stuck or not all(place.is_overdue for place in stuck):
            return None
        others = [place for place in places if place not in stuck]
        is_of_peer, deaf = False, list[int]()
        if self._meeting.num_nodes > 1:
            theirs, deaf = self._hear(now_s)
            if _is_excused(stuck, theirs):
                return None
            is_of_peer = bool(deaf)
            others += [place for of_node in theirs.values() for place in of_node]
        text = report(stuck, others)
        for node in deaf:
            text += f"; the agent of node {node} is silent"
        trace = self._ask_for_stacks(pids, text)[stuck[0].rank]
        alone = len(stuck) == 1
        log = log_path(self._log_dir, stuck[0].rank) if alone else str(self._log_dir)
        rank = stuck[0].rank if alone else -1
        return Failure(rank, "hang", text, trace, log, time.time(), is_of_peer)

    def _left_early(self, places: list[Place]) -> Failure | None:
        """Return the failure of a rank whose job is over when others have iterations to do.

        Its process waits for the others and keeps its connections, so they would wait for it. What
        one look sees may be half a beat, so it takes two.
        """
        gone = {place.rank: place for place in ended_early(places) if place.finished}
        again = sorted(gone.keys() & self._gone)
        self._gone = set(gone)
        if not again:
            return None
        rank = again[0]
        text = f"its job returned early, after {gone[rank].iteration} iterations"
        return Failure(rank, "exit", text, log=log_path(self._log_dir, rank), time_s=time.time())

    def _tell(self, places: list[Place], now_s: float) -> None:
        """Tell the other nodes where the ranks of this one are."""
        if self._meeting.num_nodes > 1 and now_s >= self._next_tell_s:
            self._next_tell_s = now_s + _TELL_S
            self._meeting.tell("places", json.dumps([now_s, places]))

    def _hear(self, now_s: float) -> tuple[dict[int, list[Place]], list[int]]:
        """Return where the ranks of other nodes are, and the nodes that say nothing any more."""
        theirs, deaf = dict[int, list[Place]](), list[int]()
        for node, word in self._meeting.hear("places").items():
            if node not in self._words or self._words[node][0] != word:
                self._words[node] = word, now_s
            if now_s - self._words[node][1] > _DEAF_S:
                deaf.append(node)
            else:
                theirs[node] = [Place(*place) for place in json.loads(word)[1]] if word else []
        return theirs, deaf

    def _ask_for_stacks(self, pids: Mapping[int, int], why: str) -> dict[int, str]:
        """Have all ranks write their stacks to their logs; return them by rank."""
        logs = {rank: log_path(self._log_dir, rank) for rank in pids}
        sizes = {}
        for rank, pid in pids.items():
            append(logs[rank], f"distrain: the stacks of rank {rank}, because {why}\n")
            sizes[rank] = os.path.getsize(logs[rank])
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)
        time.sleep(_ANSWER_S)
        stacks = {}
        for rank, log in logs.items():
            with open(log, "rb") as file:
                file.seek(sizes[rank])
                answer = file.read(_TRACE_BYTES).decode(errors="replace").strip()
            silent = f"rank {rank} did not answer when it was asked for its stacks"
            if not answer:
                append(log, silent + "\n")
            stacks[rank] = f"rank {rank} was here:\n{answer}" if answer else silent
        return stacks


def _is_excused(stuck: list[Place], theirs: Mapping[int, list[Place]]) -> bool:
    """Say whether ranks wait for another node: for one that may take its time, or will speak."""
    for places in theirs.values():
        for place in hindmost(places):
            if place.order < stuck[0].order:
                return True
            if place.order == stuck[0].order and not place.is_overdue:
                return True
    return False


def _state(pid: int) -> str:
    """Return the state of a process as one letter; "" if unknown."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""

"""Stalled ranks, found from their heartbeats alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from distrain.heartbeat import Beat, Phase

SHORTEST_S = 60.0
"""Minimum of the adaptive limit."""

STEPS = 50
"""The adaptive limit in usual steps."""

SLOW_S = 600.0
"""Minimum of the adaptive limit in the first step, and in phases that come now and then."""

_SLOW = (Phase.NONE, Phase.START, Phase.HOOKS, Phase.EVALUATION, Phase.SAVING, Phase.END)
_MAX_GAP_S = 2.0  # between two updates; in a longer gap this process was suspended itself
_WAITS_S = 0.5  # a rank silent for less may be running
_STATES = {
    "T": "stopped: state T",
    "t": "stopped by a debugger: state t",
    "D": "waits for a disk, a file server or a driver: state D",
}


class Place(NamedTuple):
    """Progress of a rank."""

    rank: int  # over all nodes
    iteration: int  # of its last beat
    phase: int
    finished: bool  # whether its job has returned
    silent_s: float  # watched seconds since its last beat
    is_overdue: bool  # whether that is over the limit
    state: str = ""  # of its process, a letter as in /proc/PID/stat; "" if unknown

    @property
    def order(self) -> tuple[int, int, bool]:
        """Sort key: least advanced first; of equals, a rank that cannot run is first."""
        return self.iteration, self.phase, not (self.finished or self.state in ("T", "t"))


@dataclass
class _Seen:
    """Heartbeats of a rank so far; times are of the watched clock."""

    beat: Beat
    since: float
    stepping_s: float = 0.0  # watched time inside of steps
    first: int | None = None  # iteration in which it was first seen in the loop
    mark: tuple[int, float] | None = None  # iteration and `stepping_s` after the first step
    last: int = -1  # iteration of the last estimate of `step_s`
    step_s: float | None = None


class Progress:
    """Follows the heartbeats of ranks.

    Its clock counts watched time only: a job that is suspended and continued has not been silent.
    The limit of `watchdog_s` holds in all phases; None: see `RankOptions`.
    """

    def __init__(self, ranks: Iterable[int], *, watchdog_s: float | None) -> None:
        self._watchdog_s = watchdog_s
        self._seen = {rank: _Seen(Beat(0, Phase.NONE, 0.0, False), 0.0) for rank in ranks}
        self._watched_s = 0.0
        self._updated_s: float | None = None
        self._has_begun = False

    def update(self, beats: Mapping[int, Beat], now_s: float) -> None:
        """Take the last beat of each rank, read at `now_s` of a monotonic clock."""
        gap_s = 0.0 if self._updated_s is None else min(now_s - self._updated_s, _MAX_GAP_S)
        self._updated_s = now_s
        self._watched_s += gap_s
        self._has_begun = self._has_begun or any(beat.phase for beat in beats.values())
        for rank, beat in beats.items():
            seen = self._seen[rank]
            if seen.beat.phase not in _SLOW and beat.phase not in _SLOW:
                seen.stepping_s += gap_s
            if beat != seen.beat or not self._has_begun:
                seen.beat, seen.since = beat, self._watched_s
                self._estimate_step(seen)

    def _estimate_step(self, seen: _Seen) -> None:
        """Estimate the usual step: the mean of all after the first."""
        iteration = seen.beat.iteration
        if seen.beat.phase in (Phase.NONE, Phase.START, Phase.END) or iteration == seen.last:
            return
        seen.last = iteration
        if seen.first is None:
            seen.first = iteration
        elif seen.mark is None:
            seen.mark = iteration, seen.stepping_s
        else:
            seen.step_s = (seen.stepping_s - seen.mark[1]) / (iteration - seen.mark[0])

    def limit_s(self, rank: int) -> float:
        """Return the allowed seconds of silence of a rank in its phase."""
        if self._watchdog_s is not None:
            return self._watchdog_s
        seen = self._seen[rank]
        limit = max(SHORTEST_S, STEPS * (seen.step_s or 0.0))
        is_slow = seen.step_s is None or seen.beat.phase in _SLOW or seen.beat.finished
        return max(limit, SLOW_S) if is_slow else limit

    def places(self, state: Callable[[int], str] = lambda rank: "") -> list[Place]:
        """Return the places of the ranks; none before the first beat: a job may have no heartbeat.

        Args:
            state: returns the state of a rank's process.
        """
        if not self._has_begun:
            return []
        found = []
        for rank, seen in self._seen.items():
            silent_s = self._watched_s - seen.since
            is_overdue = silent_s > self.limit_s(rank)
            beat = seen.beat
            found.append(Place(rank, *beat[:2], beat.finished, silent_s, is_overdue, state(rank)))
        return found


def ended_early(places: Iterable[Place]) -> list[Place]:
    """Return the ranks that ended training although others are at a later iteration."""
    places = list(places)
    last = max((place.iteration for place in places if place.phase < Phase.END), default=-1)
    return [place for place in places if place.phase == Phase.END and place.iteration <= last]


def least_advanced(places: Iterable[Place]) -> list[Place]:
    """Return the ranks with the least progress, for which all others wait in the end.

    Ranks that ended training before the others come first; finished ranks are left out.
    """
    places = list(places)
    early = ended_early(places)
    if early:
        return early
    if all(place.finished for place in places):
        return []
    running = [p for p in places if not (p.finished and p.phase == Phase.END)]
    least = min(place.order for place in running)
    return [place for place in running if place.order == least]


def report(stuck: Iterable[Place], others: Iterable[Place]) -> str:
    """Return one line: ranks and phases that are stuck, and those that wait.

    Example: "rank 1 makes no progress: 61 s in data at iteration 57 (stopped: state T); ranks 0, 2
    wait in backward at iteration 57".
    """
    parts = []
    for same in _groups(stuck):
        silent_s = min(place.silent_s for place in same)
        makes = "makes" if len(same) == 1 else "make"
        text = f"{_names(same)} {makes} no progress: {silent_s:.0f} s {_phase(same[0])}"
        if same[0].finished:
            text += ", where its job has returned"
        states = {_STATES[place.state] for place in same if place.state in _STATES}
        parts.append(text + (f" ({', '.join(sorted(states))})" if states else ""))
    for same in _groups(others):
        many = len(same) > 1
        if same[0].finished:
            verb = "have finished" if many else "has finished"
        elif min(place.silent_s for place in same) >= _WAITS_S:
            verb = "wait" if many else "waits"
        else:
            verb = "are" if many else "is"
        parts.append(f"{_names(same)} {verb} {_phase(same[0])}")
    return "; ".join(parts)


def _groups(places: Iterable[Place]) -> list[list[Place]]:
    """Return the places grouped by iteration, phase and whether they have finished."""

    def key(place: Place) -> tuple[int, int, bool]:
        return place.iteration, place.phase, place.finished

    ordered = sorted(places, key=lambda place: (key(place), place.rank))
    return [list(group) for _, group in groupby(ordered, key)]


def _phase(place: Place) -> str:
    if place.phase == Phase.NONE:
        return "before its start"
    text = f"in {Phase(place.phase).name.lower()}"
    return text if place.phase == Phase.START else f"{text} at iteration {place.iteration}"


def _names(places: list[Place]) -> str:
    """Return ranks as text: "rank 1", "ranks 0, 2", "ranks 0-62, 64"."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place.rank == runs[-1][-1] + 1:
            runs[-1].append(place.rank)
        else:
            runs.append([place.rank])
    parts = []
    for run in runs:
        parts += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(rank) for rank in run]
    return f"rank{'s' * (len(places) > 1)} {', '.join(parts)}"

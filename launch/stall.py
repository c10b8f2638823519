"""Which ranks make no progress, judged from their beats alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from distrain.heartbeat import Beat, Phase

SHORTEST_S = 60.0
"""The adaptive limit is never shorter."""

STEPS = 50
"""The adaptive limit is so many times the usual step."""

SLOW_S = 600.0
"""The adaptive limit of the first step, and of phases that come now and then, is never shorter."""

_SLOW = (Phase.NONE, Phase.START, Phase.HOOKS, Phase.EVALUATION, Phase.SAVING, Phase.END)
_GAP_S = 2.0  # a longer time between two looks was not watched: we had been stopped ourselves
_WAITS_S = 0.5  # silent for less, a rank may well be running
_STATES = {
    "T": "stopped: state T",
    "t": "stopped by a debugger: state t",
    "D": "waits for a disk, a file server or a driver: state D",
}


class Place(NamedTuple):
    """Where a rank is.

    Attributes:
        rank: over all nodes.
        iteration: of its last beat. phase: likewise.
        finished: whether its job has returned.
        silent_s: since its last beat, as long as somebody watched.
        is_overdue: whether that is longer than the limit.
        state: of its process, a letter as in /proc/PID/stat; "" if unknown.
    """

    rank: int
    iteration: int
    phase: int
    finished: bool
    silent_s: float
    is_overdue: bool
    state: str = ""

    @property
    def order(self) -> tuple[int, int, bool]:
        """The less progress, the smaller; of equals, one that cannot run is behind."""
        return self.iteration, self.phase, not (self.finished or self.state in ("T", "t"))


@dataclass
class _Seen:
    """What is known of a rank; times are of the watched clock."""

    beat: Beat
    since: float
    stepping_s: float = 0.0  # of the time watched, what was not spent outside of the step
    first: int | None = None  # the iteration in which it was first seen in the loop
    mark: tuple[int, float] | None = None  # iteration and `stepping_s`, when the first was over
    last: int = -1  # the iteration in which `step_s` was learnt
    step_s: float | None = None


class Progress:
    """Follows the beats of ranks.

    Its clock counts the time in which somebody looked: when the whole job is suspended and goes on
    later, nobody has been silent.

    Args:
        ranks: whose beats are followed.
        watchdog_s: the limit in all phases; None: 50 usual steps, at least 60 s, and at least
            600 s for the first step and outside of the step.
    """

    def __init__(self, ranks: Iterable[int], *, watchdog_s: float | None) -> None:
        self._watchdog_s = watchdog_s
        self._seen = {rank: _Seen(Beat(0, Phase.NONE, 0.0, False), 0.0) for rank in ranks}
        self._watched_s = 0.0
        self._looked_s: float | None = None
        self._has_begun = False

    def see(self, beats: Mapping[int, Beat], now_s: float) -> None:
        """Take the last beats.

        Args:
            beats: by rank.
            now_s: on a monotonic clock.
        """
        gap_s = 0.0 if self._looked_s is None else min(now_s - self._looked_s, _GAP_S)
        self._looked_s = now_s
        self._watched_s += gap_s
        self._has_begun = self._has_begun or any(beat.phase for beat in beats.values())
        for rank, beat in beats.items():
            seen = self._seen[rank]
            if seen.beat.phase not in _SLOW and beat.phase not in _SLOW:
                seen.stepping_s += gap_s
            if beat != seen.beat or not self._has_begun:
                seen.beat, seen.since = beat, self._watched_s
                self._learn_step(seen)

    def _learn_step(self, seen: _Seen) -> None:
        """Learn the usual step: the mean of all that came after the first."""
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
        """Return how long a rank may be silent where it is now."""
        if self._watchdog_s is not None:
            return self._watchdog_s
        seen = self._seen[rank]
        limit = max(SHORTEST_S, STEPS * (seen.step_s or 0.0))
        is_slow = seen.step_s is None or seen.beat.phase in _SLOW or seen.beat.finished
        return max(limit, SLOW_S) if is_slow else limit

    def places(self, state: Callable[[int], str] = lambda rank: "") -> list[Place]:
        """Return where the ranks are; none before the first beat of any: not every job beats.

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
    """Return the ranks that have ended training when others were at an iteration not done there."""
    places = list(places)
    last = max((place.iteration for place in places if place.phase < Phase.END), default=-1)
    return [place for place in places if place.phase == Phase.END and place.iteration <= last]


def hindmost(places: Iterable[Place]) -> list[Place]:
    """Return the ranks with the least progress, for which all others have to wait in the end.

    A rank that has gone through to the end is none of them; one that has ended training before
    others have done all their iterations is the only one.
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
    """Return in one line who is stuck where, and who waits.

    Example: "rank 1 makes no progress: 61 s in data at iteration 57 (stopped: state T); ranks 0, 2
    wait in backward at iteration 57".
    """
    parts = []
    for same in _alike(stuck):
        silent_s = min(place.silent_s for place in same)
        makes = "makes" if len(same) == 1 else "make"
        text = f"{_names(same)} {makes} no progress: {silent_s:.0f} s {_where(same[0])}"
        if same[0].finished:
            text += ", where its job has returned"
        states = {_STATES[place.state] for place in same if place.state in _STATES}
        parts.append(text + (f" ({', '.join(sorted(states))})" if states else ""))
    for same in _alike(others):
        many = len(same) > 1
        if same[0].finished:
            what = "have finished" if many else "has finished"
        elif min(place.silent_s for place in same) >= _WAITS_S:
            what = "wait" if many else "waits"
        else:
            what = "are" if many else "is"
        parts.append(f"{_names(same)} {what} {_where(same[0])}")
    return "; ".join(parts)


def _alike(places: Iterable[Place]) -> list[list[Place]]:
    """Return the places grouped by iteration, phase and whether they have finished."""

    def kind(place: Place) -> tuple[int, int, bool]:
        return place.iteration, place.phase, place.finished

    ordered = sorted(places, key=lambda place: (kind(place), place.rank))
    return [list(group) for _, group in groupby(ordered, kind)]


def _where(place: Place) -> str:
    if place.phase == Phase.NONE:
        return "before its start"
    name = Phase(place.phase).name.lower()
    return (
        f"in {name}" if place.phase == Phase.START else f"in {name} at iteration {place.iteration}"
    )


def _names(places: list[Place]) -> str:
    """Return ranks in words: "rank 1", "ranks 0, 2", "ranks 0-62, 64"."""
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

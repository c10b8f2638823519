"""Scalars over ranks: nothing on an ordinary step, two small collectives a window.

A window is a run of iterations that all ranks agree on. At its end every rank packs the scalars of
all its iterations into two vectors (see `packing`) and starts two asynchronous all-reduces, a sum
and a maximum. Nothing grows with the number of ranks. The stages are a step apart, so that nobody
waits: copy to the host, send, read. Stop requests ride in the maximum, and so does the time of a
step, from which all ranks compute the same length for the next window: as many periods as pass in
a second, so that short steps are charged as little as long ones, or part of a slow period.

Whatever a window's length depends on, training does not. An early stop, which code sets by what it
finds in training, is agreed on where a period ends, by a maximum of its own that all wait for; a
stop request that is there by then rides along.

Ranks may put different names. A name travels from the window after the one in which it was first
put, for all ranks must pack alike: whoever has new names publishes them in the process group's
key-value store and sets a bit in the maximum; when the bit comes back all ranks read the same list.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distrain.errors import NonFiniteLoss
from distrain.events.columns import Columns
from distrain.events.exact_sum import join, split
from distrain.events.history import Floats, Ints
from distrain.events.history_store import Block
from distrain.events.name_exchange import SharedNames, Store
from distrain.events.pending import (
    RowGroup,
    ScalarKind,
    ScalarRow,
    flatten,
    group_rows,
    read_blocks,
)
from distrain.events.storage import EventStorage, Spread

NO_STOP, STOP_EARLY, STOP_REQUESTED = 0, 1, 2

_HEADER = 3  # stop request, first iteration of new names (negative), nanoseconds of a step
_NO_NEW_NAMES = np.iinfo(np.int64).min
_TOGETHER_S = 1.0  # periods of fast steps come together for so long
_MAX_VALUES = 2**16  # of a window of several periods: half a megabyte, and as much of weights
_STOP_WITHIN_S = 1.5  # of windows; with the two steps of the stages it makes about two seconds
_MAX_ARRIVED = 2**17  # floats: on a rank that nobody asks they would pile up
_SLOW_STEP_S = 0.5  # from here on a blocking collective is no cost, and a stop should not wait


@dataclass
class _Window:
    """A window on its way: iterations [since, last] and what became of this rank's rows."""

    since: int
    last: int
    rows: list[ScalarRow]
    host: Tensor  # the values of all blocks, float64 on the host once `copied` has passed
    copied: torch.cuda.Event | None
    groups: Sequence[RowGroup] = ()
    local: Sequence[Block] = ()
    sums: Tensor | None = None
    extremes: Tensor | None = None
    works: Sequence[dist.Work] = ()


class _Arrived(NamedTuple):
    """What is kept of a window that has come back until it is folded.

    Attributes:
        iterations: (T,).
        sums: the vector that all ranks summed up.
        extremes: that of maxima, without its header.
        local: scalars that did not travel.
    """

    iterations: Ints
    sums: Floats
    extremes: Ints
    local: Sequence[Block]


class ScalarReduction:
    """Combines the scalars of an EventStorage over ranks, a window at a time.

    All methods are called by all ranks at the same iterations, from the training thread.

    Args:
        storage: where scalars come from and go to.
        period: iterations from one row of the writers to the next. A window ends where `period`
            divides the number of iterations done, or before.
        first_iter: the first iteration of this run.
        rank: of this process. world_size: how many there are.
        group: the process group of the collectives, of its own (gloo); None if world_size is 1.
        store: where new names are published; None if world_size is 1.
        stop_on_nonfinite: raise NonFiniteLoss when a loss is not finite on any rank.

    Attributes:
        stop: what all ranks agreed on: NO_STOP, STOP_EARLY or STOP_REQUESTED.
        stop_request: what this rank asks for: STOP_REQUESTED, soon by the clock; or NO_STOP.
        combined_iter: the last iteration that the histories hold whole.
        step_s: seconds of one step, the mean over the last window on the slowest rank.
    """

    def __init__(
        self,
        storage: EventStorage,
        *,
        period: int,
        first_iter: int,
        rank: int = 0,
        world_size: int = 1,
        group: dist.ProcessGroup | None = None,
        store: Store | None = None,
        stop_on_nonfinite: bool = True,
    ) -> None:
        self.stop = NO_STOP
        self.stop_request = NO_STOP
        self.combined_iter = first_iter - 1
        self.step_s = float("inf")
        self._storage = storage
        self._period = period
        self._rank, self._world_size = rank, world_size
        self._group = group
        self._names = None if store is None else SharedNames(store)
        self._stop_on_nonfinite = stop_on_nonfinite
        self._columns = Columns()
        self._held: list[ScalarRow] = []  # rows of names that not all ranks know yet
        self._since = self._close_at = first_iter
        self._window: _Window | None = None
        self._arrived: list[_Arrived] = []  # what nobody has asked for yet
        self._sent_time, self._sent_iter = time.perf_counter(), first_iter - 1
        storage.combined_by_trainer = True
        storage.fold_arrived = self.fold_arrived
        storage.spread_of = self._spread

    def advance(self, iteration: int) -> None:
        """Move what is in flight on by one stage; called early in every iteration's end.

        Raises:
            NonFiniteLoss: a loss of the window is not finite; on all ranks alike.
        """
        if self._window is not None:
            if self._window.sums is None:
                self._send(self._window)
            else:
                self._finish(self._window, iteration)

    def close_if_due(self, iteration: int) -> None:
        """Close the window if it ends with this iteration; called when all scalars are put.

        Where a period ends, agree on a stop.
        """
        if iteration >= self._close_at and self._window is None:
            self._close(iteration)
            if self.step_s > _SLOW_STEP_S:
                self._complete(iteration)
        if (iteration + 1) % self._period == 0:
            self._share_stop()
            if self._storage.early_stop:  # also if a request came meanwhile: training is over
                self.stop = STOP_EARLY

    def drain(self, iteration: int) -> None:
        """Combine all that was put, now, waiting for it: before a checkpoint and at the end.

        Raises:
            NonFiniteLoss: as in `advance`.
        """
        self._complete(iteration)
        self._close(iteration)
        if self._complete(iteration):  # new names: their values have not travelled yet
            self._close(iteration)
            self._complete(iteration)
        self._share_stop()  # an early stop is saved: the run that resumes from here stops, too

    def _share_stop(self) -> None:
        """Set early_stop and the stop by request where any rank asks for them."""
        request = self.stop_request
        if self._world_size > 1:
            # waiting, for a rank must not begin the next iteration before it knows
            asked = torch.tensor([bool(self._storage.early_stop), request], dtype=torch.uint8)
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
            early, request = asked.numpy().tolist()
            self._storage.early_stop = bool(early)
        self.stop = max(self.stop, request)

    def _complete(self, iteration: int) -> bool:
        """Bring what is in flight home, waiting; return whether names were learnt from it."""
        window, num_names = self._window, len(self._columns.kinds)
        if window is None:
            return False
        if window.sums is None:
            self._send(window)
        self._finish(window, iteration)
        return self._world_size > 1 and len(self._columns.kinds) != num_names

    def _close(self, iteration: int) -> None:
        """Stage 1: take the rows and start the copy of their tensors to the host."""
        rows = self._held + self._storage.take_rows()
        self._held = []
        host, copied = torch.empty(0, dtype=torch.float64), None
        blocks = read_blocks(rows)
        if blocks:
            host = flatten(blocks)
            if host.device.type == "cuda":
                packed = host
                host = torch.empty(len(packed), dtype=torch.float64, pin_memory=True)
                host.copy_(packed, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record()
        self._window = _Window(self._since, iteration, rows, host, copied)

    @np.errstate(invalid="ignore")  # values may be anything; losses that are not finite are told
    def _send(self, window: _Window) -> None:
        """Stage 2: lay the rows out and start the collectives."""
        if window.copied is not None:
            window.copied.synchronize()  # the device has a younger step queued, so it stays busy
        kinds = self._storage.kinds
        window.groups = groups = group_rows(window.rows, window.host.numpy())
        new = self._columns.unknown(groups, kinds)
        if new and self._names is not None:
            self._names.publish(new)
        elif new:
            self._learn(new)
        unrolled = self._columns.unroll(groups, kinds, since=window.since, last=window.last)
        window.local, self._held = unrolled.local, unrolled.held
        now = time.perf_counter()
        step_s = (now - self._sent_time) / max(1, window.last - self._sent_iter)
        self._sent_time, self._sent_iter = now, window.last
        held = max((-row.iteration for row in self._held), default=_NO_NEW_NAMES)
        header = np.array([self.stop_request, held, int(step_s * 1e9)], dtype=np.int64)
        extremes = self._columns.pack_extremes(unrolled, self._rank)
        sums = self._columns.pack_sums(unrolled)
        if self._world_size > 2:  # or the last bits would depend on the window's length
            sums = split(sums)
        window.sums = torch.from_numpy(sums)
        window.extremes = torch.from_numpy(np.concatenate([header, extremes]))
        if self._world_size > 1:
            works = (
                dist.all_reduce(window.sums, group=self._group, async_op=True),
                dist.all_reduce(
                    window.extremes, dist.ReduceOp.MAX, group=self._group, async_op=True
                ),
            )
            window.works = [work for work in works if work is not None]

    def _finish(self, window: _Window, iteration: int) -> None:
        """Stage 3: read what all ranks agreed on."""
        for work in window.works:
            work.wait()
        assert window.sums is not None
        assert window.extremes is not None
        self._window = None
        stop, held, step_ns = window.extremes[:_HEADER].tolist()
        iterations = np.arange(window.since, window.last + 1)
        sums, extremes = window.sums.numpy(), window.extremes.numpy()[_HEADER:]
        self._arrived.append(_Arrived(iterations, sums, extremes, window.local))
        with np.errstate(invalid="ignore"):
            is_finite = np.isfinite(sums.sum())
        bad: dict[str, int] = {}  # losses that are not finite -> first such iteration
        if not is_finite or len(self._arrived) * len(sums) > _MAX_ARRIVED:
            bad = self.fold_arrived()
        self.stop = max(self.stop, stop)
        self.step_s = step_ns / 1e9
        self._since, combined_iter = window.last, window.last  # late hooks put to the last one
        if held != _NO_NEW_NAMES and self._names is not None:
            self._learn(self._names.read())
            self._since, combined_iter = -held, -held - 1
        self.combined_iter = max(self.combined_iter, combined_iter)
        self._close_at = max(iteration, self._next_close(window.last))
        if bad and self._stop_on_nonfinite:
            raise NonFiniteLoss(self._describe(bad, window.groups))

    def _next_close(self, last: int) -> int:
        """Return the iteration that ends the next window; the same on all ranks."""
        step_s = max(self.step_s, 1e-9)
        to_boundary = self._period - (last + 1) % self._period
        to_stop = max(1, int(_STOP_WITHIN_S / step_s))
        if to_boundary > to_stop:
            return last + to_stop
        most = min(int(_TOGETHER_S / step_s), _MAX_VALUES // max(1, len(self._columns.kinds)))
        more_periods = max(0, most - to_boundary) // self._period
        return last + to_boundary + more_periods * self._period

    def _learn(self, kinds: Mapping[str, ScalarKind]) -> None:
        self.fold_arrived()  # it was packed with the columns of before
        self._columns.learn(kinds)

    @np.errstate(invalid="ignore")
    def fold_arrived(self) -> dict[str, int]:
        """Let the histories have the windows that have come back; the storage calls it when asked.

        Returns:
            The losses that are not finite, with the first iteration in which they are not.
        """
        arrived, self._arrived = self._arrived, []
        bad: dict[str, int] = {}
        if arrived:
            for block in self._unpack(arrived):
                self._storage.fold(block, self._columns.kinds)
                bad = _losses_not_finite(block, self._storage.kinds) | bad
        return bad

    def _unpack(self, windows: Sequence[_Arrived]) -> Iterator[Block]:
        iterations = [window.iterations for window in windows]
        sums = [window.sums for window in windows]
        if self._world_size > 2:
            sums = [join(halves) for halves in sums]
        yield from self._columns.unpack_sums(sums, iterations)
        yield from self._columns.unpack_extremes([w.extremes for w in windows], iterations)
        for window in windows:
            yield from window.local

    def _spread(self, name: str) -> Spread:
        self.fold_arrived()
        return self._columns.spread(name)

    def _describe(self, bad: Mapping[str, int], groups: Sequence[RowGroup]) -> str:
        """Say which losses are not finite, since when and on which ranks; a collective."""
        ranks = [0]
        if self._world_size > 1:
            mine = torch.tensor(
                [
                    not np.isfinite(group.values[:, group.names.index(name)]).all()
                    for group in groups
                    for name in bad
                    if name in group.names
                ]
            ).any()[None]
            all_ranks = [torch.empty_like(mine) for _ in range(self._world_size)]
            dist.all_gather(all_ranks, mine, group=self._group)
            ranks = [rank for rank, is_bad in enumerate(all_ranks) if is_bad]
        return (
            f"{', '.join(bad)} not finite from iteration {min(bad.values())} on, on "
            f"rank {', '.join(map(str, ranks))} of {self._world_size}; no checkpoint was saved "
            "since. Lower optim.lr, clip gradients (trainer.clip_norm=1.0), look at the data, or "
            "leave such updates out (trainer.nonfinite=skip)"
        )


def _losses_not_finite(block: Block, kinds: Mapping[str, ScalarKind]) -> dict[str, int]:
    """Return the losses that are not finite, with the first iteration in which they are not."""
    if np.isfinite(block.values.sum()):
        return {}
    return {
        name: int(block.iterations[~np.isfinite(values)][0])
        for name, values in zip(block.names, block.values.T, strict=True)
        if kinds[name].is_loss and not np.isfinite(values).all()
    }

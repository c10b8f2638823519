"""Windowed reduction: no collective on most steps, two asynchronous all-reduces per window.

A window is a range of iterations that all ranks agree on. At its end every rank packs the scalars
of all its iterations into two buffers (see `packing`) and starts two all-reduces, a sum and a
maximum, whose size does not grow with the number of ranks. The stages are one step apart, so that
none waits: copy to the host, send, read. The maximum also carries stop requests and the time of a
step, from which all ranks compute the same length of the next window: the periods that pass in one
second, or a part of a slow period.

The length of a window depends on the clock, training does not: an early stop, which code sets by
results of training, is agreed on at the end of a period, by a blocking maximum of its own.

Ranks may put different names, but must pack alike. So a name is sent from the window after its
first one on: a rank with new names publishes them in the key-value store and sets a bit in the
maximum; when the bit is received, all ranks read the same list.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ReduceOp

from distrain.errors import NonFiniteLoss
from distrain.events.float_encoding import join, split
from distrain.events.history import Floats, Ints
from distrain.events.history_store import Block
from distrain.events.name_exchange import NameExchange
from distrain.events.nonfinite_losses import describe, nonfinite_losses
from distrain.events.packing import Columns
from distrain.events.pending import RowGroup, ScalarKind, ScalarRow, flatten, group_rows
from distrain.events.storage import EventStorage, Spread

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

NO_STOP, STOP_EARLY, STOP_REQUESTED = 0, 1, 2

# stop request, negative first iteration of new names, nanoseconds per step, save request
_HEADER_LENGTH = 4
_NO_NEW_NAMES = np.iinfo(np.int64).min
_TARGET_WINDOW_S = 1.0  # of several periods, where steps are fast
_MAX_WINDOW_VALUES = 2**16  # of several periods: 0.5 MB of values, 0.5 MB of weights
_MAX_WINDOW_S = 1.5  # with the two steps of the stages a stop takes about 2 s
_MAX_ARRIVED_FLOATS = 2**17  # not folded yet: no writer of this rank may ever ask for them
_SLOW_STEP_S = 0.5  # from here on windows are completed at once: waiting is cheap, a stop is due


@dataclass
class _Window:
    """A window in flight: iterations [since, last] and this rank's rows, stage by stage."""

    since: int
    last: int
    rows: list[ScalarRow]
    host: Tensor  # the values of all blocks, float64, on the host after `copied`
    copied: torch.cuda.Event | None
    groups: Sequence[RowGroup] = ()
    local: Sequence[Block] = ()
    sums: Tensor | None = None
    extremes: Tensor | None = None
    works: list[dist.Work | None] = field(default_factory=list)


class _Arrived(NamedTuple):
    """A reduced window that is not in the histories yet."""

    iterations: Ints  # (T,)
    sums: Floats
    extremes: Ints  # without the header
    local: Sequence[Block]  # scalars that are not reduced


class ScalarReduction:
    """Reduces the scalars of an EventStorage over ranks, one window at a time.

    All methods are called by all ranks at the same iterations, from the training thread.

    Args:
        storage: source of rows and destination of reduced values.
        period: iterations from one row of the writers to the next. A window ends at the latest
            where `period` divides the number of iterations done.
        first_iter: the first iteration of this run.
        rank: of this process.
        world_size: number of ranks.
        group: a gloo process group for these collectives alone; None if world_size is 1.
        store: for new names; None if world_size is 1.
        stop_on_nonfinite: raise NonFiniteLoss when a loss is not finite on any rank.

    Attributes:
        stop: as agreed by all ranks: NO_STOP, STOP_EARLY or STOP_REQUESTED.
        stop_request: of this rank: STOP_REQUESTED, soon by the clock; or NO_STOP.
        save_request: of this rank: a checkpoint is due by the clock.
        save_agreed: a rank has requested one; true after the same iteration on all ranks.
        combined_iter: the last iteration that is completely reduced.
        step_s: seconds per step, the mean over the last window on the slowest rank.
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
        self.save_request = self.save_agreed = False
        self.combined_iter = first_iter - 1
        self.step_s = float("inf")
        self._storage = storage
        self._period = period
        self._rank, self._world_size = rank, world_size
        self._group = group
        self._exchange = None if store is None else NameExchange(store)
        self._stop_on_nonfinite = stop_on_nonfinite
        self._columns = Columns()
        self._held: list[ScalarRow] = []  # values of names without a column yet
        self._since = self._close_at = first_iter
        self._window: _Window | None = None
        self._arrived: list[_Arrived] = []
        self._sent_time, self._sent_iter = time.perf_counter(), first_iter - 1
        storage.is_reduced_by_trainer = True
        storage.fold_arrived = self.fold_arrived
        storage.spread_of = self._spread

    def advance(self, iteration: int) -> None:
        """Move the window in flight on by one stage; called after every step, before hooks.

        Raises:
            NonFiniteLoss: a loss of the window is not finite; raised on all ranks.
        """
        if self._window is not None:
            if self._window.sums is None:
                self._send(self._window)
            else:
                self._finish(self._window, iteration)

    def close_if_due(self, iteration: int) -> None:
        """Close the window if it ends with this iteration; at the end of a period agree on a stop.

        Called after every step, when all scalars are put.
        """
        if iteration >= self._close_at and self._window is None:
            self._close(iteration)
            if self.step_s > _SLOW_STEP_S:
                self._complete(iteration)
        if (iteration + 1) % self._period == 0:
            self._share_stop(iteration)

    def drain(self, iteration: int) -> None:
        """Reduce all values, and wait: before a checkpoint, at the end; raises as `advance`."""
        self._complete(iteration)
        self._close(iteration)
        if self._complete(iteration):  # the values of new names are still held
            self._close(iteration)
            self._complete(iteration)
        # an early stop is saved: a run that resumes from here stops too
        self._share_stop(iteration)

    def _share_stop(self, iteration: int) -> None:
        """Set early_stop and the requested stop on all ranks if any rank has them."""
        request = self.stop_request
        if self._world_size > 1:
            # blocking: no rank may begin the next iteration before it has the result
            asked = torch.tensor([bool(self._storage.early_stop), request], dtype=torch.uint8)
            dist.all_reduce(asked, ReduceOp.MAX, group=self._group)
            early, request = asked.numpy().tolist()
            self._storage.early_stop = bool(early)
        self.stop = max(self.stop, request)
        # also after a request: training is over; hooks that save or write here have to know
        if self._storage.early_stop and (iteration + 1) % self._period == 0:
            self.stop = STOP_EARLY

    def _complete(self, iteration: int) -> bool:
        """Finish the window in flight, if any, and wait; return whether names were learned."""
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
        if blocks := [block for row in rows for block in row.blocks]:
            host = flatten(blocks)
            if host.device.type == "cuda":
                packed = host
                host = torch.empty(len(packed), dtype=torch.float64, pin_memory=True)
                host.copy_(packed, non_blocking=True)
                copied = torch.cuda.Event()
                copied.record()
        self._window = _Window(self._since, iteration, rows, host, copied)

    @np.errstate(invalid="ignore")  # of any values; losses that are not finite are reported
    def _send(self, window: _Window) -> None:
        """Stage 2: pack the rows and start the all-reduces."""
        if window.copied is not None:
            window.copied.synchronize()  # the device stays busy: a later step is queued
        kinds = self._storage.kinds
        window.groups = groups = group_rows(window.rows, window.host.numpy())
        new = self._columns.unknown(groups, kinds)
        if new and self._exchange is not None:
            self._exchange.publish(new)
        elif new:
            self._learn(new)
        unrolled = self._columns.unroll(groups, kinds, since=window.since, last=window.last)
        window.local, self._held = unrolled.local, unrolled.held
        now = time.perf_counter()
        step_s = (now - self._sent_time) / max(1, window.last - self._sent_iter)
        self._sent_time, self._sent_iter = now, window.last
        held = max((-row.iteration for row in self._held), default=_NO_NEW_NAMES)
        fields = [self.stop_request, held, int(step_s * 1e9), self.save_request]
        header = np.array(fields, dtype=np.int64)
        extremes = self._columns.pack_extremes(unrolled, self._rank)
        sums = self._columns.pack_sums(unrolled)
        if self._world_size > 2:  # else the last bits depend on the window's length
            sums = split(sums)
        window.sums = torch.from_numpy(sums)
        window.extremes = torch.from_numpy(np.concatenate([header, extremes]))
        if self._world_size > 1:
            for buffer, op in (window.sums, ReduceOp.SUM), (window.extremes, ReduceOp.MAX):
                work = dist.all_reduce(buffer, op, group=self._group, async_op=True)
                window.works.append(work)

    def _finish(self, window: _Window, iteration: int) -> None:
        """Stage 3: read the results."""
        for work in window.works:
            assert work is not None
            work.wait()
        assert window.sums is not None
        assert window.extremes is not None
        self._window = None
        stop, held, step_ns, save = window.extremes[:_HEADER_LENGTH].tolist()
        self.save_agreed |= bool(save)
        iterations = np.arange(window.since, window.last + 1)
        sums, extremes = window.sums.numpy(), window.extremes.numpy()[_HEADER_LENGTH:]
        self._arrived.append(_Arrived(iterations, sums, extremes, window.local))
        with np.errstate(invalid="ignore"):
            is_finite = np.isfinite(sums.sum())
        bad: dict[str, int] = {}  # losses that are not finite -> first such iteration
        if not is_finite or len(self._arrived) * len(sums) > _MAX_ARRIVED_FLOATS:
            bad = self.fold_arrived()
        self.stop = max(self.stop, stop)
        self.step_s = step_ns / 1e9
        # the next window begins with the last iteration: late hooks may put more of it
        self._since, combined_iter = window.last, window.last
        if held != _NO_NEW_NAMES and self._exchange is not None:
            self._learn(self._exchange.read())
            self._since, combined_iter = -held, -held - 1
        self.combined_iter = max(self.combined_iter, combined_iter)
        self._close_at = max(iteration, self._next_close(window.last))
        if bad and self._stop_on_nonfinite:
            raise NonFiniteLoss(describe(bad, window.groups, self._group, self._world_size))

    def _next_close(self, last: int) -> int:
        """Return the iteration that ends the next window; the same on all ranks."""
        step_s = max(self.step_s, 1e-9)
        to_period_end = self._period - (last + 1) % self._period
        longest = max(1, int(_MAX_WINDOW_S / step_s))
        if to_period_end > longest:
            return last + longest
        most = min(
            int(_TARGET_WINDOW_S / step_s), _MAX_WINDOW_VALUES // max(1, len(self._columns.kinds))
        )
        more_periods = max(0, most - to_period_end) // self._period
        return last + to_period_end + more_periods * self._period

    def _learn(self, kinds: Mapping[str, ScalarKind]) -> None:
        self.fold_arrived()  # these windows were packed with the old columns
        self._columns.learn(kinds)

    @np.errstate(invalid="ignore")
    def fold_arrived(self) -> dict[str, int]:
        """Append the reduced windows to the histories; the storage calls this before it is read.

        Returns:
            Each loss that is not finite -> the first iteration in which it is not.
        """
        arrived, self._arrived = self._arrived, []
        bad: dict[str, int] = {}
        if arrived:
            for block in self._unpack(arrived):
                self._storage.fold(block, self._columns.kinds)
                bad = nonfinite_losses(block, self._storage.kinds) | bad
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

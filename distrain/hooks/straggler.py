"""StragglerWatch: time per phase and rank; warn of a rank that the others wait for."""

from __future__ import annotations

import os
import socket
import time

import torch

from distrain.checks import number, whole
from distrain.distributed.collectives import gather_to_all
from distrain.events.storage import Spread
from distrain.heartbeat import Phase
from distrain.log import logger
from distrain.scalar_names import STRAGGLER
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer

_OWN_S = f"{STRAGGLER}own_s"
_CAUSES = {"data": "waiting for data", "forward": "in forward", "hooks": "in hooks"}
_NAMES = {Phase.DATA: "data", Phase.FORWARD: "forward", Phase.BACKWARD: "backward"}


class StragglerWatch(HookBase):
    """Measures the phases of a step on each rank, and warns of a rank that delays the others.

    In backward every rank waits for the slowest, so a rank's own time is that of the rest: waiting
    for data, forward, hooks. One iteration in `every` is measured and put as
    `straggler/{data,forward,backward,hooks,own}_s`, seconds, the mean over ranks; their spread over
    ranks travels in the window's collective. Rank 0 puts `straggler/lost_s`, the own time of the
    slowest rank minus that of the fastest, and `straggler/slowest_rank`. Forward and backward on a
    GPU are timed there. With one rank nothing is measured.

    Args:
        every: iterations from one measurement to the next.
        share: fraction of a step; a rank is slow if its own time exceeds the fastest by more.
        patience: number of consecutive windows with one slow rank before a warning.
    """

    order = 11
    trainer: Trainer

    def __init__(self, every: int = 10, *, share: float = 0.1, patience: int = 5) -> None:
        self._every = whole("every", every, least=2)
        self._share = number("share", share, above=0)
        self._patience = whole("patience", patience, least=1)
        self._places: list[str] = []
        self._measured = -1  # first iteration whose times are not reduced yet
        self._slow_rank, self._num_windows = -1, 0  # of the last windows in a row
        self._warned = -1  # rank of the last warning

    def before_train(self) -> None:
        device = self.trainer.device
        gpu = f", GPU {device.index}" if device.type == "cuda" else ""
        self._places = gather_to_all(f"{socket.gethostname()}{gpu}, process {os.getpid()}")
        self._clock = _Clock(on_gpu=device.type == "cuda")
        self._is_measuring = False
        self._hooks_begin_s: float | None = None
        self.is_idle = len(self._places) == 1

    def before_step(self) -> None:
        if self.trainer.iter % self._every == self._every // 2:
            self._clock.start()
            self.trainer.listen(self._clock.beat)
            self._is_measuring = True
        elif self._hooks_begin_s is not None:
            self._clock.seconds["hooks"] = time.perf_counter() - self._hooks_begin_s
            self._hooks_begin_s = None

    def after_step(self) -> None:
        trainer = self.trainer
        if self._is_measuring:
            trainer.unlisten(self._clock.beat)
            self._is_measuring = False
            self._hooks_begin_s = time.perf_counter()
        elif self._hooks_begin_s is None and (seconds := self._clock.read()) is not None:
            own_s = seconds["data"] + seconds["forward"] + seconds["hooks"]
            for name, value in {**seconds, "own": own_s}.items():
                trainer.storage.put_scalar(f"{STRAGGLER}{name}_s", value, False)
            if self._measured < 0:
                self._measured = trainer.iter
        if 0 <= self._measured <= trainer.reduction.combined_iter and self._is_reduced():
            self._measured = -1
            self._judge()

    def _is_reduced(self) -> bool:
        # new names are exchanged first, so their values are reduced a window later
        return self.trainer.storage.latest_iteration(_OWN_S) >= self._measured

    def _judge(self) -> None:
        storage, step_s = self.trainer.storage, self.trainer.reduction.step_s
        own = storage.spread(_OWN_S)
        if not self.trainer.where.is_main:
            return
        storage.put_scalar(f"{STRAGGLER}lost_s", own.max - own.min, False, reduce="local")
        storage.put_scalar(f"{STRAGGLER}slowest_rank", float(own.max_rank), False, reduce="local")
        rank = own.max_rank if own.max - own.min > self._share * step_s else -1
        self._num_windows = self._num_windows + 1 if rank == self._slow_rank else 1
        self._slow_rank = rank
        if rank < 0:
            self._warned = -1
        elif self._num_windows >= self._patience and self._warned != rank:
            self._warned = rank
            logger.warning("%s", self._describe(rank, own, step_s))

    def _describe(self, rank: int, own: Spread, step_s: float) -> str:
        spreads = {name: self.trainer.storage.spread(f"{STRAGGLER}{name}_s") for name in _CAUSES}
        worst = max(spreads, key=lambda name: spreads[name].max - spreads[name].min)
        return (
            f"the other ranks wait for rank {rank} ({self._places[rank]}): in a step of "
            f"{step_s:.3g} s it takes {own.max - own.min:.3g} s more than rank {own.min_rank}, "
            f"{_CAUSES[worst]}; in {self._num_windows} windows in a row"
        )


class _Clock:
    """Time per phase of one iteration, measured from its beats; on a GPU also by events."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self.seconds: dict[str, float] = {}  # by name of the phase
        self._events: list[tuple[str, torch.cuda.Event]] = []

    def start(self) -> None:
        self.seconds = {"data": 0.0, "forward": 0.0, "backward": 0.0}
        self._events = []
        self._name, self._begin_s = "data", time.perf_counter()

    def beat(self, phase: int, /) -> None:
        if phase == Phase.END:  # of training; after a failure the GPU may not respond
            return
        now_s = time.perf_counter()
        if self._name:
            self.seconds[self._name] += now_s - self._begin_s
        self._name, self._begin_s = _NAMES.get(Phase(phase), ""), now_s
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((self._name, event))

    def read(self) -> dict[str, float] | None:
        """Return the seconds per phase once; None while there is nothing new or it is not ready."""
        if not self.seconds or (self._events and not self._events[-1][1].query()):
            return None
        seconds, self.seconds = self.seconds, {}
        if self._events:
            seconds |= {"forward": 0.0, "backward": 0.0}
            for (name, begin), (_, end) in zip(self._events, self._events[1:], strict=False):
                if name in ("forward", "backward"):
                    seconds[name] += begin.elapsed_time(end) / 1e3
        return seconds

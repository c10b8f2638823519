"""TorchProfiler: torch.profiler traces of selected steps."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from torch.profiler import ProfilerActivity, profile, record_function, schedule

from distrain.checks import whole, wrong
from distrain.files.atomic import replacing
from distrain.heartbeat import Phase
from distrain.log import logger
from distrain.run_layout import PROFILE
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer

_PHASES = (Phase.DATA, Phase.FORWARD, Phase.BACKWARD, Phase.OPTIMIZER, Phase.HOOKS)


class TorchProfiler(HookBase):
    """Profiles selected steps with torch.profiler; one file per rank under `RUN/profile`.

    `rank_0.100.pt.trace.json` begins at iteration 100. Perfetto (ui.perfetto.dev), chrome://tracing
    and TensorBoard's profiler plugin show it. The trace also has the ranges `data`, `forward`,
    `backward`, `optimizer` and `hooks`. Saving a trace takes seconds, in which the other ranks
    wait; `perf/step_s` of profiled steps means little. Other steps pay one comparison.

    Args:
        start: first recorded iteration.
        active: number of recorded iterations.
        warmup: number of iterations before them that are profiled but not recorded.
        every: iterations from one profile to the next; None: one profile.
        ranks: list of ranks, or "all".
        record_shapes: record the shapes of the operations' inputs.
        profile_memory: record each allocation.
        with_stack: record Python's stack per operation: slow, large.
        run_dir: folder of the run.
    """

    order = 5
    trainer: Trainer
    only_closes = True

    def __init__(
        self,
        start: int = 10,
        *,
        active: int = 3,
        warmup: int = 2,
        every: int | None = None,
        ranks: Sequence[int] | Literal["all"] = (0,),
        record_shapes: bool = False,
        profile_memory: bool = False,
        with_stack: bool = False,
        run_dir: str,
    ) -> None:
        self._active = whole("active", active, least=1)
        self._warmup = whole("warmup", warmup, least=0)
        self._begin = whole("start", start, least=warmup) - warmup
        if every is not None:
            whole("every", every, least=warmup + active)
        if isinstance(ranks, str) and ranks != "all":
            raise wrong("ranks", ranks, "a list of ranks, such as [0,1], or all")
        self._every, self._ranks = every, ranks
        self._new_profile = partial(
            profile,
            record_shapes=record_shapes,
            profile_memory=profile_memory,
            with_stack=with_stack,
        )
        self._folder = Path(run_dir, PROFILE)
        self._next = -1  # first iteration of the next profile, warm-up included
        self._profile: profile | None = None
        self._ranges = _Ranges()
        self._steps = 0  # steps done of the current profile

    def before_train(self) -> None:
        if self._ranks != "all" and self.trainer.where.rank not in self._ranks:
            return
        self._next = self._begin
        if self._every is not None and self._next < self.trainer.start_iter:
            behind = self.trainer.start_iter - self._next
            self._next += -(-behind // self._every) * self._every

    def before_step(self) -> None:
        if self.trainer.iter == self._next:
            self._start()
        if self._profile is not None:
            self._ranges.beat(Phase.DATA)

    def _start(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self.trainer.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._steps = 0
        self._profile = self._new_profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=self._warmup, active=self._active, repeat=1),
            on_trace_ready=self._save,
        )
        self._profile.start()
        self.trainer.listen(self._ranges.beat)

    def after_step(self) -> None:
        if self._profile is None:
            return
        self._ranges.end()
        self._steps += 1
        self._profile.step()  # saves after the last one
        if self._steps == self._warmup + self._active:
            self._stop(self._profile)
            self._next = -1 if self._every is None else self._next + self._every
        else:
            self._ranges.beat(Phase.HOOKS)

    def _stop(self, current: profile) -> None:
        self._ranges.end()
        self.trainer.unlisten(self._ranges.beat)
        self._profile = None
        current.stop()

    def after_train(self) -> None:
        if self._profile is not None:  # training ended within a profile: save its steps
            self._stop(self._profile)

    def _save(self, ended: profile) -> None:
        """Write the trace if it has a step; an error must not end training."""
        if self._steps <= self._warmup:
            return
        rank = self.trainer.where.rank
        path = self._folder / f"rank_{rank}.{self._next + self._warmup}.pt.trace.json"
        with self.trainer.pulse.phase(Phase.SAVING):
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with replacing(path, sync=False) as scratch:
                    ended.export_chrome_trace(scratch)
            except (OSError, RuntimeError) as error:
                logger.warning("trace of rank %d not saved: %s", rank, error)
                return
        logger.info("trace of rank %d: %s; open it in ui.perfetto.dev", rank, path)


class _Ranges:
    """Profiler range per phase of a step."""

    def __init__(self) -> None:
        self._open: contextlib.AbstractContextManager[object] | None = None

    def beat(self, phase: int) -> None:
        self.end()
        if phase in _PHASES:
            self._open = record_function(Phase(phase).name.lower())
            self._open.__enter__()

    def end(self) -> None:
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None

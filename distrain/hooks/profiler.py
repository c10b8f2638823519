"""Where the time of chosen steps goes, as a trace to look at."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from torch.profiler import ProfilerActivity, profile, record_function, schedule

from distrain.errors import ConfigError
from distrain.files.atomic import replacing
from distrain.heartbeat import Phase
from distrain.log import logger
from distrain.run_layout import PROFILE
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer

_NAMES = {
    Phase.DATA: "data",
    Phase.FORWARD: "forward",
    Phase.BACKWARD: "backward",
    Phase.OPTIMIZER: "optimizer",
    Phase.HOOKS: "hooks",
}


class TorchProfiler(HookBase):
    """Profiles chosen steps with torch.profiler; a file a rank under `RUN/profile`.

    `rank_0.100.pt.trace.json` begins at iteration 100. Perfetto (ui.perfetto.dev), chrome://tracing
    and TensorBoard's profiler plugin show it. Beside what torch records it has the ranges `data`,
    `forward`, `backward`, `optimizer` and `hooks`. Other steps pay one comparison. Saving a trace
    takes seconds, in which the other ranks wait; it is worth little to look at `perf/step_s` of
    profiled steps.

    Args:
        start: the first iteration that is recorded.
        active: how many are recorded.
        warmup: how many before are watched but not recorded, for the first ones are slow.
        every: do it again every so many iterations; None: once.
        ranks: which ranks; "all".
        record_shapes: shapes of the operations' inputs.
        profile_memory: each allocation, too.
        with_stack: Python's stack of each operation: slow, large.
        run_dir: folder of the run.

    Raises:
        ConfigError: an argument out of its range.
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
        if active < 1:
            raise ConfigError(f"active={active}; at least 1 iteration is needed")
        if warmup < 0:
            raise ConfigError(f"warmup={warmup}; at least 0 iterations are needed")
        if start < warmup:
            raise ConfigError(f"start={start}; at least warmup={warmup} iterations come before")
        if every is not None and every < warmup + active:
            raise ConfigError(f"every={every}; warmup and active are {warmup + active} already")
        if isinstance(ranks, str) and ranks != "all":
            raise ConfigError(f"ranks={ranks}; a list of ranks is needed, [0,1], or all")
        self._begin, self._active, self._warmup = start - warmup, active, warmup
        self._every, self._ranks = every, ranks
        self._new_profile = partial(
            profile,
            record_shapes=record_shapes,
            profile_memory=profile_memory,
            with_stack=with_stack,
        )
        self._folder = Path(run_dir, PROFILE)
        self._next = -1  # the iteration that begins a profile
        self._profile: profile | None = None
        self._ranges = _Ranges()
        self._steps = 0  # of the profile that are done

    def before_train(self) -> None:
        """Find out when to begin, maybe in a run that was resumed."""
        if self._ranks != "all" and self.trainer.where.rank not in self._ranks:
            return
        self._next = self._begin
        if self._every is not None and self._next < self.trainer.start_iter:
            behind = self.trainer.start_iter - self._next
            self._next += -(-behind // self._every) * self._every

    def before_step(self) -> None:
        """Begin a profile if it is time, and the step's range of data."""
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
        """Go on to the next step of the profile, or end it."""
        if self._profile is None:
            return
        self._ranges.end()
        self._steps += 1
        self._profile.step()  # after the last it saves
        if self._steps == self._warmup + self._active:
            self._stop()
            self._next = -1 if self._every is None else self._next + self._every
        else:
            self._ranges.beat(Phase.HOOKS)

    def _stop(self) -> None:
        assert self._profile is not None
        self._ranges.end()
        self.trainer.unlisten(self._ranges.beat)
        ended, self._profile = self._profile, None
        ended.stop()

    def after_train(self) -> None:
        """End a profile in the middle, and save what it has."""
        if self._profile is not None:
            self._stop()

    def _save(self, ended: profile) -> None:
        """Write the trace if it has a step; what goes wrong must not end training."""
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
                logger.warning("no trace of rank %d is saved: %s", rank, error)
                return
        logger.info("trace of rank %d: %s; open it in ui.perfetto.dev", rank, path)


class _Ranges:
    """Opens a range of the profiler for each phase."""

    def __init__(self) -> None:
        self._open: contextlib.AbstractContextManager[object] | None = None

    def beat(self, phase: int) -> None:
        """End the range of the phase before, and begin one where the new phase has a name."""
        self.end()
        name = _NAMES.get(Phase(phase))
        if name is not None:
            self._open = record_function(name)
            self._open.__enter__()

    def end(self) -> None:
        """End the range that is open."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None

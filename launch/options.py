"""RankOptions: how a node's agent starts, restarts, stops and watches its ranks."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import threading
from dataclasses import dataclass

from distrain.checks import number, one_of, whole
from distrain.process.garbage import importing

_TASKS = "/proc/self/task"
_num_threads_after_import: int | None = None  # of this process, when it had just imported torch


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """Options of every launcher with an agent; keys of conf/launch/options/ranks.yaml.

    Args:
        max_restarts: restarts of all ranks after a failed one, within one attempt.
        grace_s: seconds from a stop request until remaining ranks are killed.
        start_method: "fork" or "spawn"; None: fork where it is sound, because it is faster.
        watchdog_s: seconds without progress, in any phase, until all ranks are killed as after a
            failure; 0: never; None: 50 usual steps, at least 60 s, and at least 600 s for the first
            step and outside of the step.

    Raises:
        ConfigError: an argument is out of range.
    """

    max_restarts: int = 0
    grace_s: float = 120.0
    start_method: str | None = None
    watchdog_s: float | None = None

    def __post_init__(self) -> None:
        whole("max_restarts", self.max_restarts, least=0)
        number("grace_s", self.grace_s, above=0)
        if self.watchdog_s is not None:
            number("watchdog_s", self.watchdog_s)
        if self.start_method is not None:
            one_of("start_method", self.start_method, ("fork", "spawn"))

    def rank_options(self) -> RankOptions:
        """Return these options alone, picklable, without those of a subclass."""
        names = [entry.name for entry in dataclasses.fields(RankOptions)]
        return RankOptions(**{name: getattr(self, name) for name in names})

    def with_start_method(self) -> RankOptions:
        """Return the options with the start method decided; may import torch."""
        method = self.start_method or ("fork" if _may_fork() else "spawn")
        return dataclasses.replace(self.rank_options(), start_method=method)


def import_torch() -> None:
    """Import torch so that a launcher of this process can still fork its ranks."""
    global _num_threads_after_import
    if "torch" not in sys.modules:
        with importing():
            importlib.import_module("torch")
        if os.path.isdir(_TASKS):
            _num_threads_after_import = _num_threads()


def _may_fork() -> bool:
    """Return whether a forked rank can use torch; imports it.

    It can, on Linux, if this process has only imported torch: the thread pools of OpenMP and
    autograd, and a CUDA context, do not survive a fork.
    """
    if threading.active_count() > 1:
        return False
    import_torch()
    import torch

    baseline = _num_threads_after_import
    return baseline is not None and _num_threads() <= baseline and not torch.cuda.is_initialized()


def _num_threads() -> int:
    """Return the number of threads of this process, native ones included."""
    return len(os.listdir(_TASKS))

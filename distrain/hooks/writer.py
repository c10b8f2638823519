"""PeriodicWriter: rows of scalars, images and histograms for the writers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distrain.checks import refuse_url, wrong
from distrain.config.instantiate import build
from distrain.distributed.ranks import topology
from distrain.errors import ConfigError
from distrain.hooks.periodic import is_finished
from distrain.redact import masked
from distrain.runfolder.allowed_changes import changes_of_run
from distrain.scalar_names import ETA_S, LR, NONDETERMINISTIC_PREFIXES, STEP_S
from distrain.trainer.hook import HookBase
from distrain.trainer.module_state import kept_generators
from distrain.writers.background import BackgroundWriter
from distrain.writers.base import Row, RunInfo, Writer
from distrain.writers.defaults import default_writers

logger = logging.getLogger(__name__)


class PeriodicWriter(HookBase):
    """Writes one row per `trainer.window` iterations, on rank 0, in a thread of its own.

    A row holds every scalar as it was at that iteration: the median over the window where the
    scalar may be smoothed, its latest value elsewhere. It is written when the scalars have been
    reduced over ranks, a few iterations later; where steps are short, the rows of one second come
    together. An evaluation within a window has a row of its own, with its metrics only.

    Args:
        writers: name -> Writer, or the node of one, which is built on rank 0 only where the hook's
            own node has `_recursive_: false`; null leaves a name out. Or a list.
            None: TensorBoard, JSON lines and console.
        run_dir: the run folder; null: the current folder.
        conf: the configuration, for writers that show it.
    """

    order = 90
    order_at_end = 75  # after the final evaluation, before the final checkpoint
    only_closes = True

    def __init__(
        self,
        writers: Mapping[str, Any] | Sequence[Any] | None = None,
        *,
        run_dir: str | None = None,
        conf: dict[str, Any] | None = None,
    ) -> None:
        if writers is None and run_dir is None:
            raise ConfigError("run_dir=null: expected a folder where no writers are given")
        refuse_url("run_dir", run_dir)
        self._run_dir = Path(run_dir or ".")
        self._conf = conf
        self._writers: Sequence[Writer] = ()
        if topology().is_main:
            with kept_generators():  # an import may draw, and other ranks have no writers
                self._writers = default_writers() if writers is None else _built(writers)
        self._writer: BackgroundWriter | None = None
        self._written = 0  # number of iterations up to and with the last row of a whole window
        # metrics since then, by the number of iterations
        self._evaluations: dict[int, dict[str, float]] = {}

    def before_train(self) -> None:
        """Open the writers; write the rows that were not complete in the resumed checkpoint."""
        if not self.trainer.where.is_main:
            return
        self._written = min(self._written, self.trainer.start_iter)
        self._new_images = self.trainer.storage.images.reader()
        self._new_histograms = self.trainer.storage.pending_histograms.reader()
        with kept_generators():
            run = RunInfo(
                self._run_dir,
                self._written,
                masked(self._conf or {}),
                self._iters_per_epoch(),
                changes_of_run(self._run_dir),
            )
            self._writer = BackgroundWriter(self._writers, run)
        self._keep_evaluation()
        self._write_complete()

    def _iters_per_epoch(self) -> float | None:
        per_epoch = self.trainer.iters_per_epoch if self.trainer.is_in_epochs else None
        return None if per_epoch is None else float(per_epoch)

    def after_step(self) -> None:
        if self._writer is not None:
            self._keep_evaluation()
            self._write_complete(but_last=is_finished(self.trainer))  # see `state_dict`
        else:  # no writer of this rank reads them
            self.trainer.storage.clear_images()
            self.trainer.storage.clear_histograms()

    def after_train(self) -> None:
        try:
            if self.trainer.error is None:
                self.trainer.reduction.drain(self.trainer.storage.iter)
            self._write_end()
        finally:
            if self._writer is not None:
                self._writer.close()

    def _write_end(self) -> None:
        """Write complete rows; unless training failed also the last row and the end of the run."""
        if self._writer is None:
            return
        # The final checkpoint is saved after this: a run killed in between would count as finished
        # and never write its last row. So an error is logged, and the other ranks, which are in the
        # collectives of the save, do not wait for this one.
        try:
            self._write_complete()
            if self.trainer.error is None:
                done, window = self.trainer.iter_done, self.trainer.window
                self._write_evaluations(done)
                scalars = self.trainer.storage.scalars_until(done - 1, window_size=window)
                self._write(done, scalars)
                self._finish_run()
        except Exception:
            logger.warning("the last row could not be written", exc_info=True)

    def _write_complete(self, *, but_last: bool = False) -> None:
        """Write the rows that are complete; not that of the last iteration if `but_last`."""
        window, done = self.trainer.window, self.trainer.reduction.combined_iter + 1
        if but_last:
            done = min(done, self.trainer.iter_done - 1)
        dues = range(self._written - self._written % window + window, done + 1, window)
        if not dues:
            return
        iterations = [due - 1 for due in dues]
        rows = self.trainer.storage.scalars_until_each(iterations, window_size=window)
        for due, scalars in zip(dues, rows, strict=True):
            self._write_evaluations(due)
            self._write(due, scalars, more_follow=due != dues[-1])
            self._written = due
            self._evaluations = {at: m for at, m in self._evaluations.items() if at > due}

    def _keep_evaluation(self) -> None:
        """Keep the metrics of this iteration: a row holds the last ones of its window only."""
        if metrics := self.trainer.metrics_now():
            self._evaluations[self.trainer.iter_done] = metrics

    def _write_evaluations(self, done: int) -> None:
        """Write a row for each evaluation before `done` that the row of `done` does not show."""
        assert self._writer is not None
        for at, metrics in self._evaluations.items():
            if at < done:
                iteration = max(0, at - 1)  # an evaluation at the start is put as iteration 0
                scalars = {name: (value, iteration) for name, value in metrics.items()}
                self._writer.write(Row(iteration, self.trainer.max_iter, scalars, more_follow=True))

    def _write(
        self, done: int, scalars: dict[str, tuple[float, int]], *, more_follow: bool = False
    ) -> None:
        assert self._writer is not None
        if STEP_S in scalars:
            step_s, at = scalars[STEP_S]
            scalars[ETA_S] = (step_s * (self.trainer.max_iter - done), at)
        histograms = [(name, pending.read(), at) for name, pending, at in self._new_histograms()]
        images, max_iter = self._new_images(), self.trainer.max_iter
        self._writer.write(Row(done - 1, max_iter, scalars, images, histograms, more_follow))

    def _finish_run(self) -> None:
        """Mark the run as finished, with its latest metrics, if all iterations are done."""
        done = self.trainer.iter_done
        if done == self.trainer.max_iter and self._writer is not None:
            scalars = self.trainer.storage.scalars_until(done - 1, window_size=1)
            left_out = (LR, *NONDETERMINISTIC_PREFIXES)
            metrics = {n: value for n, (value, _) in scalars.items() if not n.startswith(left_out)}
            self._writer.finish(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Write complete rows; return how far they reach."""
        if self._writer is not None:
            self._keep_evaluation()
            # the final evaluation, which may be still to come, belongs into the last row
            self._write_complete(but_last=is_finished(self.trainer))
            if is_finished(self.trainer):  # the end may fail, and the next start does the end only
                self._writer.flush()
        evaluations = [[at, metrics] for at, metrics in self._evaluations.items()]
        return {"written": self._written, "evaluations": evaluations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._written = state["written"]
        self._evaluations = dict(state["evaluations"])


def _built(writers: Mapping[str, Any] | Sequence[Any]) -> list[Writer]:
    """Return the writers, those given as nodes built.

    Raises:
        ConfigError: a node cannot be built, or is no Writer; names its key.
    """
    if not isinstance(writers, Mapping | Sequence) or isinstance(writers, str):
        raise wrong("writers", writers, "a mapping of writers by name")
    named = writers if isinstance(writers, Mapping) else dict(enumerate(writers))
    built = []
    for name, node in named.items():
        key = f"writers.{name}"
        writer = build(node, key) if isinstance(node, Mapping) else node
        if writer is None:
            continue
        if not isinstance(writer, Writer):
            raise ConfigError(
                f"{key}={type(writer).__name__}: expected a Writer; derive it from "
                "distrain.writers.Writer"
            )
        built.append(writer)
    return built

"""Writing what the histories hold."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from distrain.checks import refuse_url
from distrain.hooks.periodic import is_finished
from distrain.redact import masked
from distrain.scalar_names import ETA_S, LR, NONDETERMINISTIC_PREFIXES, STEP_S
from distrain.trainer.hook import HookBase
from distrain.trainer.module_state import kept_generators
from distrain.writers.background import BackgroundWriter
from distrain.writers.base import Row, Writer
from distrain.writers.defaults import default_writers

logger = logging.getLogger(__name__)

# keys of the configuration that change nothing about what is learned
_NO_HPARAMS = ("run", "resume", "plan", "checkpoint", "launch", "hooks")


class PeriodicWriter(HookBase):
    """Writes a row every `trainer.window` iterations, on rank 0, in a thread beside training.

    A row holds every scalar as it was then: the median over the window where the scalar may be
    smoothed, its latest value elsewhere. It is written when the scalars have been combined over
    ranks, a few iterations later; where steps are short, the rows of a second come together.

    Args:
        writers: each gets all rows.
        run_dir: without writers, TensorBoard, JSON lines and console write into this run folder.
        conf: of the run; shown as text and hyperparameters in TensorBoard.
    """

    order = 90
    order_at_end = 75  # after the final evaluation, before the final checkpoint
    only_closes = True

    def __init__(
        self,
        writers: Sequence[Writer] | None = None,
        *,
        run_dir: str | None = None,
        conf: dict[str, Any] | None = None,
    ) -> None:
        if writers is None and run_dir is None:
            raise ValueError("nowhere to write: give writers or run_dir")
        refuse_url("run_dir", run_dir)
        self._given = writers
        self._run_dir = run_dir
        self._conf = conf
        self._writer: BackgroundWriter | None = None
        self._written = 0  # number of iterations up to and with the last row of a whole window

    def before_train(self) -> None:
        """Open the writers; write the row that the resumed checkpoint was made just before."""
        if not self.trainer.where.is_main:
            return
        self._written = min(self._written, self.trainer.start_iter)
        if self._given is None:
            assert self._run_dir is not None
            with kept_generators():  # an import may draw, and only rank 0 has writers
                self._given = default_writers(self._run_dir, start_iteration=self._written)
                self._describe_run()
        self._writer = BackgroundWriter(self._given)
        self._write_complete()

    def after_step(self) -> None:
        """Write a row if one is complete."""
        if self._writer is not None:
            self._write_complete(but_last=is_finished(self.trainer))  # see `state_dict`
        else:  # nobody writes this rank's: let them go
            self.trainer.storage.clear_images()
            self.trainer.storage.clear_histograms()

    def after_train(self) -> None:
        """Write what is left and close the writers.

        The final checkpoint is saved after that, or a run killed in between would take itself for
        finished and never write its last row; so a failure here is told, and no more.
        """
        try:
            if self.trainer.error is None:
                self.trainer.reduction.drain(self.trainer.storage.iter)
            self._write_end()
        finally:
            if self._writer is not None:
                self._writer.close()

    def _write_end(self) -> None:
        """Write what is complete; then, unless training failed, the last row and the run's end."""
        if self._writer is None:
            return
        try:
            self._write_complete()
            if self.trainer.error is None:
                done, window = self.trainer.iter_done, self.trainer.window
                scalars = self.trainer.storage.scalars_until(done - 1, window_size=window)
                self._write(done, scalars)
                self._finish_run()
        except Exception:  # the other ranks are on their way into the collectives of the save
            logger.warning("the last row could not be written", exc_info=True)

    def _write_complete(self, *, but_last: bool = False) -> None:
        """Write the rows that are complete; not that of the last iteration if `but_last`."""
        window, done = self.trainer.window, self.trainer.reduction.combined_iter + 1
        if but_last:
            done = min(done, self.trainer.iter_done - 1)
        dues = range(self._written - self._written % window + window, done + 1, window)
        if not dues:
            return
        rows = self.trainer.storage.scalars_until_each(
            [due - 1 for due in dues], window_size=window
        )
        for due, scalars in zip(dues, rows, strict=True):
            self._write(due, scalars, is_followed=due != dues[-1])
            self._written = due

    def _write(
        self, done: int, scalars: dict[str, tuple[float, int]], *, is_followed: bool = False
    ) -> None:
        assert self._writer is not None
        storage = self.trainer.storage
        if STEP_S in scalars:
            step_s, at = scalars[STEP_S]
            scalars[ETA_S] = (step_s * (self.trainer.max_iter - done), at)
        row = Row(
            done - 1,
            self.trainer.max_iter,
            scalars,
            storage.vis_data(),
            storage.histograms(),
            is_followed,
        )
        storage.clear_images()
        storage.clear_histograms()
        self._writer.write(row)

    def _describe_run(self) -> None:
        from distrain.writers.tensorboard import TensorBoardWriter

        for writer in self._given or ():
            if isinstance(writer, TensorBoardWriter) and self._conf is not None:
                import yaml

                conf = masked(self._conf)
                text = yaml.safe_dump(conf, sort_keys=False)
                writer.text("config", f"```yaml\n{text}\n```")
                writer.hparams({k: v for k, v in conf.items() if k not in _NO_HPARAMS})

    def _finish_run(self) -> None:
        """Mark the run as finished, with its latest metrics, if it is."""
        from distrain.writers.tensorboard import TensorBoardWriter

        if self.trainer.iter_done != self.trainer.max_iter:
            return
        scalars = self.trainer.storage.scalars_until(self.trainer.iter_done - 1, window_size=1)
        metrics = {
            name: value
            for name, (value, _) in scalars.items()
            if not name.startswith((LR, *NONDETERMINISTIC_PREFIXES))
        }
        for writer in self._given or ():
            if isinstance(writer, TensorBoardWriter):
                writer.finish(metrics, iteration=self.trainer.iter_done - 1)

    def state_dict(self) -> dict[str, Any]:
        """Return how far was written, which is all that is complete."""
        if self._writer is not None:
            # the final evaluation, which may be still to come, belongs into the last row
            self._write_complete(but_last=is_finished(self.trainer))
            if is_finished(self.trainer):  # the end may fail, and the next start does the end only
                self._writer.flush()
        return {"written": self._written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back how far was written."""
        self._written = state["written"]

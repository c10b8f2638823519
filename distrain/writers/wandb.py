"""WandbWriter: rows, images, histograms and configuration to Weights & Biases."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from distrain.extras import optional_library
from distrain.files import atomic
from distrain.run_layout import WANDB_RUN_ID
from distrain.writers.base import Row, RunInfo, Writer
from distrain.writers.pixels import pixels

logger = logging.getLogger(__name__)

_MAX_BINS = 512  # of wandb.Histogram


class WandbWriter(Writer):
    """Writes the scalars of metrics.jsonl, images and histograms to Weights & Biases.

    The step of W&B is the iteration of the row. The run's id is kept in the run folder: a resumed
    run continues the run of W&B, which ignores the steps that it has already. Without a network
    or a key, or with `mode="offline"`, the files are in `wandb/` of the run folder, for
    `wandb sync`.
    W&B's own metrics of the machine and its copy of the console are off, as `gpu/...` and the run
    folder have both; so is its record of the command line, which is not masked.

    Args:
        project: of W&B.
        entity: user or team; null: your own.
        name: of the run; null: the run folder's.
        mode: "offline" writes files only; null: online, or as WANDB_MODE says.
        options: other keywords of `wandb.init`, as `{tags: [a], group: b}`.

    Raises:
        ConfigError: wandb is not installed.
    """

    is_remote = True

    def __init__(
        self,
        project: str = "distrain",
        *,
        entity: str | None = None,
        name: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._wandb = optional_library("wandb", extra="wandb")
        self._init = {"project": project, "entity": entity, "mode": mode, **(options or {})}
        self._name = name
        self._run: Any = None
        self._is_finished = False

    def open(self, run: RunInfo) -> None:
        self._init |= {
            "id": _run_id(run.run_dir / WANDB_RUN_ID),
            "resume": "allow",
            "dir": str(run.run_dir),
            "name": self._name or run.run_dir.name,
            "config": dict(run.conf),
        }

    def write(self, row: Row) -> None:
        if self._run is None:  # not in `open`: it waits for the server
            self._run = self._start()
        values: dict[str, Any] = {name: value for name, (value, _) in row.new.items()}
        for name, image, _ in row.images:
            values[name] = self._wandb.Image(pixels(image))
        for name, histogram, _ in row.histograms:
            if len(histogram.counts) <= _MAX_BINS:
                bins = (histogram.counts.tolist(), histogram.edges.tolist())
                values[name] = self._wandb.Histogram(np_histogram=bins)
        if values:
            self._run.log(values, step=row.iteration)

    def _start(self) -> Any:
        """Return the run of W&B; without an answer of its server one that is offline."""
        settings = self._wandb.Settings(
            console="off",
            x_disable_stats=True,
            x_disable_meta=True,  # it has the command line, whose overrides may be secrets
            silent=True,
        )
        errors = self._wandb.errors
        try:
            return self._wandb.init(**{"settings": settings, **self._init})
        except (errors.CommError, errors.UsageError, errors.AuthenticationError) as error:
            reason = str(error).splitlines()[0]
            logger.warning("W&B: %s The run is offline: upload it by `wandb sync`", reason)
            return self._wandb.init(**{"settings": settings, **self._init, "mode": "offline"})

    def finish(self, metrics: Mapping[str, float]) -> None:
        self._is_finished = True
        if self._run is not None:
            self._run.summary.update(metrics)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if self._is_finished else 1)


def _run_id(path: Path) -> str:
    """Return the id of the run in a file, which is created if there is none."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        run_id = secrets.token_hex(4)  # draws from no generator of the run
        atomic.write(path, run_id.encode())
        return run_id

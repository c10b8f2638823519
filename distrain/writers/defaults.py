"""The writers of an ordinary run: TensorBoard, JSON lines and console."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TextIO

from distrain.run_layout import METRICS_FILE, TENSORBOARD
from distrain.writers.base import NewScalars, Writer


def default_writers(
    run_dir: str | os.PathLike[str], *, start_iteration: int = 0, stream: TextIO | None = None
) -> list[Writer]:
    """Return the writers of an ordinary run: TensorBoard, JSON lines and console.

    Args:
        run_dir: gets tensorboard/ and metrics.jsonl.
        start_iteration: first iteration to be run; what an interrupted attempt wrote of it and of
            later ones is dropped.
        stream: of the console; the standard output by default.
    """
    # imported here: these cost 0.1 s, and only rank 0 has writers
    from distrain.writers.console import ConsoleWriter
    from distrain.writers.json_lines import JsonLinesWriter
    from distrain.writers.tensorboard import TensorBoardWriter

    new = NewScalars(start_iteration)
    return [
        TensorBoardWriter(Path(run_dir, TENSORBOARD), purge_step=start_iteration, new=new),
        JsonLinesWriter(Path(run_dir, METRICS_FILE), start_iteration=start_iteration, new=new),
        ConsoleWriter(stream=stream, start_iteration=start_iteration, new=new),
    ]

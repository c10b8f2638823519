"""Adapters for torchelastic: files of the ranks, no signal handlers, no logging."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from distrain.files.temp_folder import TemporaryFolder
from distrain.launch.rank import loopback_env
from distrain.launch.watchdog import Watchdog
from distrain.process.environment import environment


class RankFiles(LogsSpecs):
    """Environment of each rank: its failure file, its heartbeat file, and network variables.

    Failure files lie in a temporary folder until the end of the `with`: the run folder may be full
    or lost.
    """

    def __init__(self, log_dir: Path, *, nodes: int, watchdog: Watchdog) -> None:
        super().__init__()
        self._log_dir = log_dir
        self._watchdog = watchdog
        self._errors = TemporaryFolder("errors-")
        self._network = loopback_env(os.environ) if nodes == 1 else {}

    @property
    def root_log_dir(self) -> str:
        return str(self._log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return the destinations of a new attempt; add variables to `envs`, by local rank."""
        self._watchdog.add_files(envs.values())
        files = {}
        for local_rank, env in envs.items():
            files[local_rank] = f"{self._errors_dir}/rank_{env['RANK']}.json"
            Path(files[local_rank]).unlink(missing_ok=True)  # of the attempt before
            env["TORCHELASTIC_ERROR_FILE"] = files[local_rank]
            env.update(self._network)
        console = dict.fromkeys(envs, "")
        return LogsDest(stdouts=console, stderrs=dict(console), error_files=files)

    def __enter__(self) -> None:
        self._errors_dir = self._errors.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._errors.__exit__(*error)
        self._watchdog.close()


def silence_torch() -> None:
    """Keep the agent's log from the console: our own lines report the same."""
    logger = logging.getLogger("torch.distributed.elastic")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    logger.propagate = False


@contextlib.contextmanager
def no_handlers_of_torch() -> Iterator[None]:
    """Keep torch's agent from installing signal handlers in this process."""
    with environment({"TORCHELASTIC_SIGNALS_TO_HANDLE": ""}):
        yield

"""What torch's elastic agent is told: where ranks write to, and to be silent and hear no signal."""

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


class RankFiles(LogsSpecs):
    """Gives each rank a file for its failure, one for its beats, and variables torch does not set.

    The files of failures lie in a temporary folder until the end of the `with`: the run's folder
    may be full, or gone.

    Args:
        folder: of the logs.
        nodes: how many there are.
        watchdog: hands out the files for beats.
    """

    def __init__(self, folder: Path, *, nodes: int, watchdog: Watchdog) -> None:
        super().__init__()
        self._folder = folder
        self._watchdog = watchdog
        self._errors = TemporaryFolder("errors-")
        self._files: set[str] = set()
        self._env = loopback_env(os.environ) if nodes == 1 else {}

    @property
    def root_log_dir(self) -> str:
        """Return the folder of the logs."""
        return str(self._folder)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return where a new attempt writes to.

        Args:
            envs: variables of the ranks by local rank; added to.
        """
        self._watchdog.hand_out(envs.values())
        files = {}
        for local_rank, env in envs.items():
            files[local_rank] = f"{self._errors_in}/rank_{env['RANK']}.json"
            env["TORCHELASTIC_ERROR_FILE"] = files[local_rank]
            env.update(self._env)
        self._files |= set(files.values())
        self._remove()  # those of the attempt before, or of a start that was killed
        console = dict.fromkeys(envs, "")
        return LogsDest(stdouts=console, stderrs=dict(console), error_files=files)

    def __enter__(self) -> None:
        self._errors_in = self._errors.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._errors.__exit__(*error)
        self._watchdog.close()

    def _remove(self) -> None:
        for path in self._files:
            Path(path).unlink(missing_ok=True)


def silence_torch() -> None:
    """Keep the agent's log to itself: what it says, we say in one line."""
    logger = logging.getLogger("torch.distributed.elastic")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    logger.propagate = False


@contextlib.contextmanager
def no_handlers_of_torch() -> Iterator[None]:
    """Have torch's agent leave the signals of this process alone."""
    name = "TORCHELASTIC_SIGNALS_TO_HANDLE"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before

"""Failures of ranks: recorded where they happen; the cause found among several."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from distrain.errors import ConfigError, NonFiniteLoss, RankFailed, RunFailed, RunRefused
from distrain.files import atomic

_LOST_PEER = re.compile(
    r"gloo[/\\]|connection (was )?(closed|reset|refused)|broken pipe|socket timeout|timed out|"
    r"nccl (error|communicator)|remote process exited|watchdog|aborted",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """Failure of one rank."""

    rank: int  # over all nodes; -1 for all ranks together
    # "config", "nonfinite", "failed" and "refused" as in `distrain.errors`; "exit": the rank
    # left early; "signal": killed by a signal; "killed": all ranks, by the agent; "hang":
    # stalled, killed by the agent; "error": any other exception
    kind: str
    text: str  # one line
    trace: str = ""  # traceback, "" without one
    log: str = ""  # the rank's log file, or the folder of all logs
    time_s: float = 0.0  # seconds since 1970 by the rank's clock
    of_peer: bool = False  # whether it looks like a consequence of another rank's failure

    @property
    def is_final(self) -> bool:
        """Whether a restart would fail in the same way."""
        return self.kind in ("config", "nonfinite", "refused")

    def line(self) -> str:
        """Return one line with rank, error and log."""
        if self.kind == "hang":
            return f"{self.text} (log: {self.log})"
        if self.rank < 0:
            return f"{self.text} (logs: {self.log})"
        return f"rank {self.rank} failed: {self.text} (log: {self.log})"

    def error(self) -> Exception:
        """Return the exception to raise where the job was started."""
        if self.kind == "config":
            return ConfigError(self.text)
        if self.kind == "nonfinite":
            return NonFiniteLoss(self.text)
        if self.kind in ("failed", "refused"):
            return RunFailed(self.text)
        return RankFailed(f"{self.line()}\n{self.trace}".rstrip())


def cause(failures: Iterable[Failure]) -> Failure:
    """Return the failure that led to the others: the earliest that is not of a lost peer."""
    # a dying rank breaks the connections of the others, which may report that before it does
    return min(failures, key=lambda failure: (failure.of_peer, failure.time_s))


def of_exception(error: BaseException, *, rank: int, log: str) -> Failure:
    """Return the failure of a rank whose job raised `error`."""
    kind, text = "error", _one_line(error)
    if isinstance(error, ConfigError):
        kind, text = "config", str(error)
    elif isinstance(error, NonFiniteLoss):
        kind, text = "nonfinite", str(error)
    elif isinstance(error, RunFailed):
        kind, text = "refused" if isinstance(error, RunRefused) else "failed", str(error)
    elif isinstance(error, SystemExit):
        kind, text = "exit", f"the program left early by sys.exit({error.code!r})"
    trace = "".join(traceback.format_exception(error))
    of_peer = kind == "error" and _is_of_peer(error)
    return Failure(rank, kind, text, trace, log, time.time(), of_peer)


def of_exit_code(code: int, *, rank: int, log: str) -> Failure:
    """Return the failure of a rank whose process ended without a record; -9 is SIGKILL."""
    if code >= 0:
        text = f"its process left early by exit code {code}"
        return Failure(rank, "exit", text, log=log, time_s=time.time())
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    text = f"its process was ended by {name}"
    if -code == signal.SIGKILL:
        text += ": by a user, or by the system for lack of memory"
    return Failure(rank, "signal", text, log=log, time_s=time.time())


def write(failure: Failure, path: str) -> None:
    """Write a failure to a file that torch's agents can read too."""
    extra = {"py_callstack": failure.trace, "timestamp": str(int(failure.time_s))}
    record = {
        "message": {"message": failure.text, "extraInfo": extra},
        "distrain": dataclasses.asdict(failure),
    }
    atomic.write(path, json.dumps(record).encode(), sync=False)


def read(path: str) -> Failure | None:
    """Return the failure in a file; None without one."""
    try:
        with open(path) as file:
            record: dict[str, Any] = json.load(file)
        return Failure(**record["distrain"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _one_line(error: BaseException) -> str:
    """Return type, first line and notes of an exception as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = type(error).__name__
    notes = [note for note in getattr(error, "__notes__", []) if "\n" not in note]
    suffix = f" ({', '.join(reversed(notes))})" if notes else ""
    return (f"{name}: {lines[0]}" if lines else name) + suffix


def _is_of_peer(error: BaseException) -> bool:
    """Return whether an exception, or one of its causes, is a lost connection."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if _is_connection_error(current):
            return True
        current = current.__cause__ or (
            None if current.__suppress_context__ else current.__context__
        )
    return False


def _is_connection_error(error: BaseException) -> bool:
    if isinstance(error, ConnectionError):
        return True
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return isinstance(error, RuntimeError) and bool(_LOST_PEER.search(str(error)))

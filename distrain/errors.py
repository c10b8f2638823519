"""The situations a run can end in, one class each, and the exit codes they become."""

from enum import IntEnum


class ConfigError(ValueError):
    """A mistake of the user: one line with the key, its value, the allowed values and the fix."""


class RankFailed(RuntimeError):
    """One rank failed and so did the run; the text names the rank, its log and its first error."""


class RunFailed(RuntimeError):
    """The run cannot begin or has failed; the text is one line, all that the user needs."""


class RunRefused(RunFailed):
    """The run cannot begin, and another try would fail in the same way."""


class StoppedBeforeStart(RunFailed):
    """A stop was requested while the run waited for its start: nothing of it is left."""


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite; every rank raises this after the same iteration."""


class ReplicaDrift(RuntimeError):
    """Ranks no longer hold the same model; every rank raises this after the same iteration."""


def add_note(error: BaseException, note: str) -> None:
    """Add a note as `error.add_note`, which Python 3.10 lacks: its tracebacks do not show it."""
    vars(error).setdefault("__notes__", []).append(note)


class ExitCode(IntEnum):
    """Exit codes of the command."""

    FINISHED = 0
    FAILED = 1
    BAD_CONFIG = 2
    STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request with a checkpoint saved; run again


def exit_code(error: Exception) -> ExitCode:
    """Return the exit code of a command that ends with an error."""
    if isinstance(error, StoppedBeforeStart):
        return ExitCode.STOPPED
    return ExitCode.BAD_CONFIG if isinstance(error, ConfigError) else ExitCode.FAILED

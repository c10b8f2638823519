"""The situations a run can end in, one class each, and the exit codes they become."""

from enum import IntEnum


class ConfigError(ValueError):
    """A mistake of the user: one line with key, value, what is allowed and what to do next."""


class RankFailed(RuntimeError):
    """One rank failed and so did the run; the text names the rank, its log and its first error."""


class RunFailed(RuntimeError):
    """The run cannot begin or has failed; the text is one line, all that the user needs."""


class RunRefused(RunFailed):
    """The run cannot begin, and another try would fail in the same way."""


class NonFiniteLoss(RuntimeError):
    """A loss became NaN or infinite; every rank raises this after the same iteration."""


class ReplicaDrift(RuntimeError):
    """Ranks no longer hold the same model; every rank raises this after the same iteration."""


def add_note(error: BaseException, note: str) -> None:
    """Do what `error.add_note` does; in Python 3.10 tracebacks do not show the note."""
    vars(error).setdefault("__notes__", []).append(note)


class ExitCode(IntEnum):
    """What the command returns to the shell."""

    FINISHED = 0
    FAILED = 1
    BAD_CONFIG = 2
    STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request with a checkpoint saved; run again

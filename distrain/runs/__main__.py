"""python -m distrain.runs: a table of runs; show, diff, plot, stop and resume them; GPUs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from distrain.checks import did_you_mean
from distrain.errors import ConfigError, ExitCode
from distrain.launch.client import State
from distrain.process.stdio import for_reader
from distrain.runs.escape import escaped
from distrain.runs.find import name_of, resolve_run
from distrain.runs.table import COLUMNS, METRIC, show_table

_COMMANDS = """commands:
  show RUN                         configuration, last values, attempts, checkpoints, logs
  diff RUN RUN2                    differences: configuration, code, last values
  plot RUN... --scalar NAME -o PNG scalars of several runs in one picture
  stop RUN                         save its state and stop it
  resume RUN [KEY=VALUE...]        continue it by the command of its last start
  gpus                             GPUs of this machine: who holds them, who waits for them

A RUN is a folder, or a run's name below --folder (runs). Exit status: 0, 1 if a run that was asked
to stop failed instead, 2 for a mistake."""


class _Parser(argparse.ArgumentParser):
    """Parser that raises a mistake as one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _table(argv: Sequence[str]) -> int:
    parser = _Parser(
        prog="python -m distrain.runs",
        description="The runs below a folder: state, progress, goodput.",
        epilog=_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"))
    parser.add_argument("--metric", help=f"scalar to show ({METRIC})")
    parser.add_argument("--sort", default="name", help=f"by {', '.join(COLUMNS)}")
    parser.add_argument("--reverse", action="store_true", help="largest first")
    parser.add_argument("--state", action="append", default=[], help=f"only {', '.join(State)}")
    parser.add_argument("--json", action="store_true", help="all fields, for programs")
    options = parser.parse_args(argv)
    sort = "metric" if options.sort == (options.metric or METRIC) else options.sort
    if sort not in COLUMNS:
        parser.error(f"--sort {sort}: no such column; available: {', '.join(COLUMNS)}")
    states = [name for each in options.state for name in each.split(",")]
    for name in states:
        if name not in list(State):
            parser.error(f"--state {name}: no such state; available: {', '.join(State)}")
    return show_table(
        options.folder,
        metric=options.metric,
        sort=sort,
        is_reversed=options.reverse,
        states=[State(name) for name in states],
        as_data=options.json,
    )


def _show(argv: Sequence[str]) -> int:
    parser = _of_run("show", "Configuration, last values, attempts, checkpoints and logs of a run.")
    parser.add_argument("--lines", type=int, default=10, help="of each log (10)")
    parser.add_argument("--metric", help=f"the scalar in the heading ({METRIC})")
    parser.add_argument("--all", action="store_true", help="all scalars: guard, straggler, perf")
    options = parser.parse_args(argv)
    if options.lines < 0:
        parser.error(f"--lines {options.lines}: expected at least 0")
    from distrain.runs.show import show

    path = resolve_run(options.run, options.folder)
    return show(path, lines=options.lines, metric=options.metric, is_full=options.all)


def _diff(argv: Sequence[str]) -> int:
    parser = _of_run("diff", "Differences between two runs: configuration, code, last values.")
    parser.add_argument("other", metavar="RUN2")
    parser.add_argument("--all", action="store_true", help="all scalars: guard, straggler, perf")
    options = parser.parse_args(argv)
    from distrain.runs.compare import compare

    left, right = (resolve_run(name, options.folder) for name in (options.run, options.other))
    return compare(left, right, is_full=options.all)


def _plot(argv: Sequence[str]) -> int:
    parser = _of_run("plot", "Scalars over the iterations, one line per run.", nargs="+")
    scalar, rows = "repeatable; wildcards: eval/*", "rows of the moving mean"
    parser.add_argument("--scalar", action="append", metavar="NAME", help=scalar)
    parser.add_argument("-o", "--out", type=Path, required=True, metavar="PNG")
    parser.add_argument("--smooth", type=int, default=1, metavar="ROWS", help=rows)
    options = parser.parse_args(argv)
    if options.smooth < 1:
        parser.error(f"--smooth {options.smooth}: expected at least 1 row")
    paths = [resolve_run(name, options.folder) for name in options.run]
    runs = [(name_of(path, options.folder), path) for path in paths]
    from distrain.runs.plot import plot

    patterns = options.scalar or [METRIC]
    return plot(runs, patterns=patterns, out=options.out, smooth=options.smooth)


def _stop(argv: Sequence[str]) -> int:
    parser = _of_run("stop", "Save a run's state, stop it, and wait until it has stopped.")
    parser.add_argument("--no-wait", action="store_true", help="return after the request")
    options = parser.parse_args(argv)
    from distrain.runs.control import stop

    return stop(resolve_run(options.run, options.folder), wait=not options.no_wait)


def _resume(argv: Sequence[str]) -> int:
    parser = _of_run("resume", "Continue a run by the command of its last start.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_intermixed_args(argv)
    from distrain.runs.control import resume

    return resume(resolve_run(options.run, options.folder), options.overrides)


def _gpus(argv: Sequence[str]) -> int:
    parser = _Parser(
        prog="python -m distrain.runs gpus",
        description="The GPUs of this machine: the runs that hold them, other processes on them, "
        "and the runs that wait for them.",
    )
    parser.add_argument("--json", action="store_true", help="all fields, for programs")
    options = parser.parse_args(argv)
    from distrain.runs.gpus import show_gpus  # imports the binding of NVML

    return show_gpus(as_data=options.json)


def _of_run(command: str, description: str, *, nargs: str | None = None) -> _Parser:
    """Return the parser of a command about runs."""
    parser = _Parser(prog=f"python -m distrain.runs {command}", description=description)
    run = "a run's folder, or its name below --folder"
    parser.add_argument("run", metavar="RUN", nargs=nargs, help=run)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="of the runs (runs)")
    return parser


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "show": _show,
    "diff": _diff,
    "plot": _plot,
    "stop": _stop,
    "resume": _resume,
    "gpus": _gpus,
}


def run(argv: Sequence[str]) -> int:
    """Run a command; return its exit code. A mistake is one line."""
    return for_reader(lambda: _run(argv))


def _run(argv: Sequence[str]) -> int:
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        words = [each for each in argv if not each.startswith("-")]
        if len(words) > 1 and words[0] == argv[0] and not Path(argv[0]).is_dir():
            raise ConfigError(f"{argv[0]}: no such command; {did_you_mean(argv[0], COMMANDS)}")
        return _table(argv)
    except ConfigError as error:
        print(escaped(f"distrain.runs: {error}"), file=sys.stderr)
        return int(ExitCode.BAD_CONFIG)


def main() -> None:
    """Run the command line and leave with its exit code."""
    sys.path.append(os.getcwd())  # for a launcher of the folder's own code
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()

"""`python -m distrain.tune`: successive halving over the runs of a sweep.

All runs train up to the first rung, the best of them continue to the next one, and so on; the last
ones reach the end. A run is promoted by resuming it, so its bits are those of an uninterrupted run.
Nothing but the run folders records the progress: the same command continues after a kill.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from distrain.checks import refuse_url
from distrain.cli.sweep import folder_name, swept_values
from distrain.errors import ConfigError, ExitCode
from distrain.runfolder.objective import Mode
from distrain.text import table
from distrain.tune.training import Runner, Search, Trial

_OPTIONS = {
    "run.dir": "--folder",
    "trainer.max_iter": "--rungs, whose last one is the length of a whole run",
    "trainer.max_epochs": "--rungs, whose last one is the length of a whole run",
    "sweep.metric": "--metric",
    "sweep.mode": "--mode",
}
"""Key that a search sets -> its option."""


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser; other arguments are for `python -m distrain`."""
    parser = argparse.ArgumentParser(
        prog="python -m distrain.tune",
        usage="%(prog)s --metric NAME --rungs N,N,... [--mode max|min] [--keep F] [--parallel P] "
        "[--folder DIR] +experiment=x key=a,b,c ...",
        description="Successive halving: train all combinations of the values up to the first "
        "rung, continue the best of them to the next one, and so on. The last rung is the length "
        "of a whole run. The same command again continues where it was interrupted.",
        epilog="Exit status: 0 done, 1 all runs failed, 2 a wrong argument or a run that cannot "
        "start, 75 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--metric", required=True, help="scalar to compare, as eval/accuracy")
    parser.add_argument("--mode", choices=["max", "min"], default="max", help="default: max")
    parser.add_argument("--rungs", required=True, help="iterations of the rungs, as 100,300,900")
    parser.add_argument(
        "--keep", type=float, default=1 / 3, metavar="F", help="part that continues (default: 1/3)"
    )
    parser.add_argument(
        "--parallel",
        type=int,
        metavar="P",
        help="runs at the same time (default: 1; with launch=slurm all of a rung)",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/tune"), help="of the runs (default: runs/tune)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options, rest = build_parser().parse_known_args(arguments)
    try:
        search, trials = plan(options, rest)
        return run(search, trials, Runner(search, trials))
    except ConfigError as error:
        print(f"distrain.tune: {error}", file=sys.stderr)
        return ExitCode.BAD_CONFIG
    except OSError as error:  # as where --folder is a file, or the disk is full
        print(f"distrain.tune: {error}", file=sys.stderr)
        return ExitCode.FAILED


def plan(options: argparse.Namespace, rest: Sequence[str]) -> tuple[Search, list[Trial]]:
    """Return the search and its trials; ConfigError if an argument does not work."""
    try:
        rungs = [int(each) for each in options.rungs.split(",")]
    except ValueError:
        rungs = []
    if not rungs or rungs[0] < 1 or rungs != sorted(set(rungs)):
        raise ConfigError(f"--rungs {options.rungs}: expected growing integers, as 100,300,900")
    if not 0 < options.keep < 1:
        raise ConfigError(f"--keep {options.keep}: expected a number between 0 and 1")
    if options.parallel is not None and options.parallel < 1:
        raise ConfigError(f"--parallel {options.parallel}: expected at least 1")
    for argument in rest:
        if option := _OPTIONS.get(argument.lstrip("+").partition("=")[0]):
            raise ConfigError(f"{argument}: expected {option}")
    refuse_url("--folder", options.folder)
    fixed, swept = swept_values(rest)
    if not swept:
        raise ConfigError("expected at least one key with several values, as optim.lr=0.1,0.01")
    keys = [argument.lstrip("+~").partition("=")[0] for argument in rest]
    if not any(key == "hooks.eval" or key.startswith("hooks.eval.period") for key in keys):
        fixed.append(f"hooks.eval.period={rungs[0]}")
    search = Search(
        fixed, options.folder, options.metric, options.mode, rungs, options.keep, options.parallel
    )
    # without duplicates, as of optim.lr=0.1,0.1: they would be one run
    combinations = [list(each) for each in dict.fromkeys(itertools.product(*swept))]
    return search, [
        Trial(each, search.folder / folder_name(",".join(each))) for each in combinations
    ]


def run(search: Search, trials: list[Trial], runner: Runner) -> int:
    """Train the trials rung by rung; print the table; return the exit status."""
    alive = list(trials)
    for number, rung in enumerate(search.rungs, 1):
        print(f"rung {number} of {len(search.rungs)}: {len(alive)} runs to {rung} iterations")
        if not runner.train(alive, rung):
            print("distrain.tune: stopped, run again to continue", file=sys.stderr)
            return ExitCode.STOPPED
        if refused := sum(trial.is_refused for trial in alive):
            print(_table(search, trials))
            raise ConfigError(
                f"{refused} of {len(alive)} runs could not start; none is promoted without them: "
                "the same command tries again, without their values it continues without them"
            )
        alive = [trial for trial in alive if not trial.error]
        if not alive:
            break
        alive.sort(key=lambda trial: _rank(trial, search.mode))
        if rung != search.rungs[-1]:
            alive = alive[: max(1, int(len(alive) * search.keep))]
    print(_table(search, trials))
    return ExitCode.FINISHED if alive else ExitCode.FAILED


def _rank(trial: Trial, mode: Mode) -> float:
    if trial.value is None:
        return float("inf")  # no finite value
    return -trial.value if mode == "max" else trial.value


def _table(search: Search, trials: Sequence[Trial]) -> str:
    """Return the table of all trials, the longest and best first."""
    ordered = sorted(trials, key=lambda t: (bool(t.error), -t.rung, _rank(t, search.mode)))
    rows = [["run", "iterations", search.metric]]
    for trial in ordered:
        value = "-" if trial.value is None else f"{trial.value:.6g}"
        rows.append([trial.path.name, str(trial.compared), trial.error[:100] or value])
    return table(rows, right=[1])

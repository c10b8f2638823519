"""`python -m distrain.tune`: successive halving over the runs of a sweep.

All runs train up to the first rung, the best of them continue to the next one, and so on; the last
ones reach the end. A run is promoted by resuming it, so its bits are those of an uninterrupted run.
Nothing but the run folders records the progress: the same command continues after a kill.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from distrain.checkpoint.catalog import newest_valid
from distrain.cli.sweep import folder_name, swept_values
from distrain.config.overrides import quoted
from distrain.errors import ConfigError, ExitCode
from distrain.launch.client import ACTIVE
from distrain.run_layout import CHECKPOINTS
from distrain.runfolder.objective import Mode, objective
from distrain.runs import control
from distrain.runs.summary import summarize_one
from distrain.text import table

_HOOK = "+hooks.tune"
_LIBC = ctypes.CDLL(None)  # here: a forked child must not load a library
_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0  # each poll may ask a scheduler


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser; other arguments are for `python -m distrain`."""
    parser = argparse.ArgumentParser(
        prog="python -m distrain.tune",
        usage="%(prog)s --metric NAME --rungs N,N,... [--mode max|min] [--keep F] [--parallel P] "
        "[--folder DIR] +experiment=x key=a,b,c ...",
        description="Successive halving: train all combinations of the values up to the first "
        "rung, continue the best of them to the next one, and so on. The last rung is the length "
        "of a whole run. The same command again continues where it was interrupted.",
        epilog="Exit status: 0 done, 1 all runs failed, 2 a wrong argument, 75 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--metric", required=True, help="scalar to compare, as eval/accuracy")
    parser.add_argument("--mode", choices=["max", "min"], default="max", help="default: max")
    parser.add_argument("--rungs", required=True, help="iterations of the rungs, as 100,300,900")
    parser.add_argument(
        "--keep", type=float, default=1 / 3, metavar="F", help="part that continues (default: 1/3)"
    )
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="P", help="runs at the same time (default: 1)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/tune"), help="of the runs (default: runs/tune)"
    )
    return parser


@dataclass(frozen=True)
class Search:
    """The runs to compare, and how."""

    arguments: list[str]  # of `python -m distrain`, without the values that differ
    folder: Path
    metric: str
    mode: Mode
    rungs: list[int]
    keep: float
    parallel: int


@dataclass
class Trial:
    """One run: its values, its best objective, and how far it has come."""

    overrides: list[str]
    path: Path
    rung: int = 0
    value: float | None = None
    error: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options, rest = build_parser().parse_known_args(arguments)
    try:
        search, trials = plan(options, rest)
        return run(search, trials)
    except ConfigError as error:
        print(f"distrain.tune: {error}", file=sys.stderr)
        return ExitCode.BAD_CONFIG


def plan(options: argparse.Namespace, rest: Sequence[str]) -> tuple[Search, list[Trial]]:
    """Return the search and its trials.

    Raises:
        ConfigError: an argument does not work.
    """
    try:
        rungs = [int(each) for each in options.rungs.split(",")]
    except ValueError:
        rungs = []
    if not rungs or rungs[0] < 1 or rungs != sorted(set(rungs)):
        raise ConfigError(f"--rungs {options.rungs}: expected growing integers, as 100,300,900")
    if not 0 < options.keep < 1:
        raise ConfigError(f"--keep {options.keep}: expected a number between 0 and 1")
    if options.parallel < 1:
        raise ConfigError(f"--parallel {options.parallel}: expected at least 1")
    taken = ("run.dir", "trainer.max_iter", "trainer.max_epochs", "sweep.metric", "sweep.mode")
    for argument in rest:
        if argument.lstrip("+").partition("=")[0] in taken:
            raise ConfigError(f"{argument}: expected --folder, --rungs, --metric or --mode")
        if argument.lstrip("+").startswith("checkpoint.mirror="):
            raise ConfigError(
                "checkpoint.mirror: expected none, as the runs of a search would share its place"
            )
    fixed, swept = swept_values(rest)
    if not swept:
        raise ConfigError("expected at least one key with several values, as optim.lr=0.1,0.01")
    if not any(argument.startswith("hooks.eval.period=") for argument in rest):
        fixed.append(f"hooks.eval.period={rungs[0]}")
    search = Search(
        fixed, options.folder, options.metric, options.mode, rungs, options.keep, options.parallel
    )
    combinations = [list(each) for each in itertools.product(*swept)]
    return search, [
        Trial(each, search.folder / folder_name(",".join(each))) for each in combinations
    ]


def run(search: Search, trials: list[Trial]) -> int:
    """Train the trials rung by rung; print the table; return the exit status."""
    alive = list(trials)
    for number, rung in enumerate(search.rungs, 1):
        print(f"rung {number} of {len(search.rungs)}: {len(alive)} runs to {rung} iterations")
        if not _train(search, alive, rung):
            return ExitCode.STOPPED
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


def _train(search: Search, trials: Sequence[Trial], rung: int) -> bool:
    """Train trials up to a rung, several at a time; return False after Ctrl-C or SIGTERM."""
    is_stopped = False

    def stop(*_: object) -> None:
        nonlocal is_stopped
        is_stopped = True
        for trial in trials:
            for process in trial.processes:
                process.terminate()

    def one(trial: Trial) -> None:
        if not is_stopped:
            _train_one(search, trial, rung)
        if is_stopped and _is_active(trial):  # a job goes on without the process that follows it
            control.stop(trial.path, wait=False)

    before = [signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with ThreadPoolExecutor(search.parallel) as pool:
            for _ in pool.map(one, trials):
                pass
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    return not is_stopped


def _train_one(search: Search, trial: Trial, rung: int) -> None:
    """Train one trial up to a rung, unless it is there; set its value or its error."""
    _await_earlier(trial)
    if _iterations(trial) < rung:
        log = trial.path.with_name(trial.path.name + ".log")
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as output:
            process = subprocess.Popen(
                _command(search, trial),
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C comes by `stop` alone
                preexec_fn=_end_with_parent,
            )
            trial.processes.append(process)
            code = process.wait()
            trial.processes.remove(process)
        if code in (ExitCode.STOPPED, -signal.SIGTERM) and _iterations(trial) < rung:
            return  # interrupted
        if code not in (ExitCode.FINISHED, ExitCode.STOPPED):
            lines = log.read_text(errors="replace").strip().splitlines()
            trial.error = f"exit code {code}: {lines[-1] if lines else ''}"[:100]
            print(f"{trial.path.name}: {trial.error}; {log}", file=sys.stderr)
            return
    trial.rung = rung
    trial.value = objective(trial.path, search.metric, mode=search.mode, max_iter=rung)
    shown = "no finite value" if trial.value is None else f"{trial.value:.6g}"
    print(f"{trial.path.name}: {search.metric} {shown}", flush=True)


def _await_earlier(trial: Trial) -> None:
    """Wait for a run that an earlier command left: its process saves its state, its job trains."""
    if not _is_active(trial):
        return
    print(f"{trial.path.name}: waits for the run of an earlier command", flush=True)
    while _is_active(trial):
        time.sleep(_POLL_S)


def _is_active(trial: Trial) -> bool:
    return trial.path.exists() and summarize_one(trial.path).state in ACTIVE


def _command(search: Search, trial: Trial) -> list[str]:
    stops = ",".join(map(str, search.rungs[:-1]))
    return [
        *(sys.executable, "-m", "distrain", *search.arguments, *trial.overrides),
        *(f"run.dir={quoted(str(trial.path))}", f"trainer.max_iter={search.rungs[-1]}"),
        *(f"{_HOOK}._target_=distrain.hooks.StopAt", f"{_HOOK}.iterations=[{stops}]"),
    ]


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM to this child when the command dies: it saves and stops."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _iterations(trial: Trial) -> int:
    newest = newest_valid(trial.path / CHECKPOINTS)
    return 0 if newest is None else newest.iteration


def _table(search: Search, trials: Sequence[Trial]) -> str:
    """Return the table of all trials, the longest and best first."""
    ordered = sorted(trials, key=lambda t: (bool(t.error), -t.rung, _rank(t, search.mode)))
    rows = [["run", "iterations", search.metric]]
    for trial in ordered:
        value = "-" if trial.value is None else f"{trial.value:.6g}"
        rows.append([trial.path.name, str(trial.rung), trial.error or value])
    return table(rows, right=[1])

"""Train trials up to a rung: as processes on this machine, or as one job array."""

from __future__ import annotations

import ctypes
import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distrain.checkpoint.catalog import newest_valid
from distrain.checkpoint.mirror_url import mirror_of
from distrain.config.import_path import import_from_here, locate
from distrain.config.overrides import quoted
from distrain.errors import ConfigError, ExitCode
from distrain.launch.client import ACTIVE, State
from distrain.run_layout import CHECKPOINTS, CONFIG_FILE
from distrain.runfolder.objective import Mode, objective
from distrain.runs import control
from distrain.runs.summary import summaries, summarize_one

_HOOK = "+hooks.tune"
_LIBC = ctypes.CDLL(None)  # here: a forked child must not load a library
_PR_SET_PDEATHSIG = 1
_POLL_S = 1.0
_JOB_POLL_S = 3.0  # each poll asks a scheduler, once for all runs


@dataclass(frozen=True)
class Search:
    """The runs to compare, and how.

    Attributes:
        arguments: of `python -m distrain`, without the values that differ.
        folder: of the runs.
        metric: scalar to compare.
        mode: whether its largest or its smallest value is the best.
        rungs: iterations of each rung.
        keep: part of the runs that continues.
        parallel: runs at the same time; None: one, or all jobs of a rung.
    """

    arguments: list[str]
    folder: Path
    metric: str
    mode: Mode
    rungs: list[int]
    keep: float
    parallel: int | None


@dataclass
class Trial:
    """One run: its values, its best objective, and how far it has come."""

    overrides: list[str]
    path: Path
    rung: int = 0
    compared: int = 0  # iterations of `value`: fewer than `rung` if the run ended itself
    value: float | None = None
    error: str = ""
    is_refused: bool = False  # it could not start

    @property
    def iterations(self) -> int:
        """Iterations of the newest valid checkpoint."""
        newest = newest_valid(self.path / CHECKPOINTS)
        return 0 if newest is None else newest.iteration


class Runner:
    """Runs the trials of a search."""

    def __init__(self, search: Search, trials: Sequence[Trial]) -> None:
        """Read the configuration of the first trial.

        Raises:
            ConfigError: it cannot be composed, `--parallel` does not work, or a trial exists with
                another configuration.
        """
        self.is_stopped = False
        self._search = search
        self._processes: list[subprocess.Popen[bytes]] = []
        conf = _composed([*search.arguments, *trials[0].overrides])
        self._mirror = mirror_of(conf)
        self._job_arguments = _job_arguments(conf["launch"], search.parallel)
        self._waits_for_gpus = "wait" in conf["launch"]
        self._check_same([trial for trial in trials if (trial.path / CONFIG_FILE).exists()])

    def train(self, trials: Sequence[Trial], rung: int) -> bool:
        """Train trials up to a rung, set their values or errors; False after Ctrl-C or SIGTERM."""
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self.stop) for number in numbers]
        try:
            if self._job_arguments is not None:
                self._as_jobs(trials, rung)
            else:
                with ThreadPoolExecutor(self._search.parallel or 1) as pool:
                    for _ in pool.map(lambda trial: self._as_process(trial, rung), trials):
                        pass
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
        return not self.is_stopped

    def _check_same(self, begun: Sequence[Trial]) -> None:
        """Raise ConfigError if one of the trials that exist has another configuration.

        A trial that has come to its rung is not started again: nothing else would find out.
        """
        if not begun:
            return
        prefix = "distrain: "
        done = subprocess.run(
            [sys.executable, "-m", "distrain.tune.same"],
            input="\n".join(json.dumps(self._arguments(each)) for each in begun),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            # libraries may warn before it
            own = [line.removeprefix(prefix) for line in lines if line.startswith(prefix)]
            raise ConfigError((own or lines[-1:])[0])

    def stop(self, *_: object) -> None:
        """Let the runs save their states and stop; a signal handler."""
        self.is_stopped = True
        for process in self._processes:
            process.terminate()

    def _as_process(self, trial: Trial, rung: int) -> None:
        self._await_earlier([trial], _POLL_S)
        log = trial.path.with_name(trial.path.name + ".log")
        if not self.is_stopped and trial.iterations < rung:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as output:
                process = subprocess.Popen(
                    [sys.executable, "-m", "distrain", *self._arguments(trial)],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C comes by `stop` alone
                    preexec_fn=_end_with_parent,
                )
                self._processes.append(process)
                code = process.wait()
                self._processes.remove(process)
            if code not in (ExitCode.FINISHED, ExitCode.STOPPED) and not self.is_stopped:
                lines = log.read_text(errors="replace").strip().splitlines()
                trial.error = f"exit code {code}: {lines[-1] if lines else ''}"
                trial.is_refused = code == ExitCode.BAD_CONFIG
        self._compare(trial, rung, log)

    def _as_jobs(self, trials: Sequence[Trial], rung: int) -> None:
        """Submit one job array, and wait for its end."""
        self._await_earlier(trials, _JOB_POLL_S)
        behind = [trial for trial in trials if trial.iterations < rung]
        log = self._search.folder / "jobs.log"
        if behind and not self.is_stopped:
            assert self._job_arguments is not None
            lines = [json.dumps(self._arguments(each) + self._job_arguments) for each in behind]
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "ab") as output:
                # in a session of its own, and not killed by `stop`: no job is left without its id
                subprocess.run(
                    [sys.executable, "-m", "distrain.tune.array"],
                    input="\n".join(lines).encode(),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    check=False,  # the errors of runs are in the log
                )
            self._await(behind, _JOB_POLL_S)
        for trial in trials:
            self._compare(trial, rung, log)

    def _await_earlier(self, trials: Sequence[Trial], poll_s: float) -> None:
        """Wait for the runs of an earlier command: processes save their states, jobs train."""
        for trial in _active(trials):
            print(f"{trial.path.name}: waits for the run of an earlier command", flush=True)
        self._await(trials, poll_s)

    def _await(self, trials: Sequence[Trial], poll_s: float) -> None:
        """Wait until no trial is active; after `stop`, request that they stop, and return."""
        while active := _active(trials):
            if self.is_stopped:
                for trial in active:
                    control.stop(trial.path, wait=False)
                return
            time.sleep(poll_s)

    def _compare(self, trial: Trial, rung: int, log: Path) -> None:
        """Set the value of a trial, or its error if it has not come to the rung."""
        iterations = trial.iterations
        if self.is_stopped and iterations < rung:
            return
        if iterations < rung and not trial.error:
            trial.error, trial.is_refused = "not started", not trial.path.exists()
            if not trial.is_refused:
                run = summarize_one(trial.path)
                why = f": {run.why}" if run.why else ""
                # a run that ended itself, as by EarlyStopping, is compared by the value it has
                is_early = run.state == State.FINISHED
                trial.error = "" if is_early else f"{run.state} at {iterations} of {rung}{why}"
        if trial.error:
            print(f"{trial.path.name}: {trial.error}; {log}", file=sys.stderr)
            return
        search = self._search
        trial.rung, trial.compared = rung, min(rung, iterations)
        trial.value = objective(trial.path, search.metric, mode=search.mode, max_iter=rung)
        shown = "no finite value" if trial.value is None else f"{trial.value:.6g}"
        print(f"{trial.path.name}: {search.metric} {shown}", flush=True)

    def _arguments(self, trial: Trial) -> list[str]:
        stops = ",".join(map(str, self._search.rungs[:-1]))
        mirror = []
        if self._mirror:  # a place of its own for each trial, as in a sweep
            place = f"{self._mirror}/{trial.path.name}"
            mirror = [f"checkpoint.mirror={quoted(place)}"]
        gpus = ["launch.wait=true"] * self._waits_for_gpus  # refused ones would lose to the others
        return [
            *self._search.arguments,
            *trial.overrides,
            *mirror,
            *gpus,
            *(f"run.dir={quoted(str(trial.path))}", f"trainer.max_iter={self._search.rungs[-1]}"),
            *(f"{_HOOK}._target_=distrain.hooks.StopAt", f"{_HOOK}.iterations=[{stops}]"),
        ]


def _composed(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the configuration of `python -m distrain`, with its interpolations."""
    words = [sys.executable, "-m", "distrain", *arguments, "--cfg", "job"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ConfigError(lines[-1].removeprefix("distrain: "))
    conf: dict[str, Any] = yaml.safe_load(done.stdout)
    return conf


def _job_arguments(launch: Mapping[str, Any], parallel: int | None) -> list[str] | None:
    """Return the arguments of trials that are jobs; None if the launcher waits for their ends."""
    import_from_here()
    if locate(launch["_target_"], "launch._target_").waits:
        return None
    arguments = ["launch.follow=false"] * ("follow" in launch)
    if parallel is None:
        return arguments
    if "array_parallelism" not in launch:
        raise ConfigError(f"--parallel {parallel}: {launch['_target_']} has no limit of jobs")
    return [*arguments, f"launch.array_parallelism={parallel}"]


def _active(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials whose processes or jobs have not ended."""
    begun = [trial for trial in trials if trial.path.exists()]
    runs = summaries([trial.path for trial in begun])
    return [trial for trial, run in zip(begun, runs, strict=True) if run.state in ACTIVE]


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM to this child when the command dies: it saves and stops."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

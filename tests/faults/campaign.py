"""Kill and signal a real run at random moments, start it again, and compare it with a quiet one.

    python tests/faults/campaign.py --fault kill --trials 20

A trial starts the command on two ranks with a loader worker each, waits a random time, does the
fault to a random process of it, and starts the same command again until it has finished:

    kill, term, int, usr2    that signal to any process, in one start or two
    crash                    kill -9 of all processes when a checkpoint appears; the last of them
                             appears before the final evaluation
    stop                     SIGSTOP to a rank, for ever: the watchdog has to name it
    flip                     kill -9, and one bit of the newest checkpoint is another
    soak                     ten faults of kill, term, stop and flip in one run, each to a process
                             without which a start cannot go on

The trial is survived if the last checkpoint, metrics.jsonl and TensorBoard say what they say after
a run that nobody disturbed, if no process, no file, no temporary file and no shared memory is left
over, and if each start ended as it should.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from runner import HANG_S, ROLES, Reference, Runner, differences, find_all, reference

FAULTS = {
    "kill": signal.SIGKILL,
    "crash": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "usr2": signal.SIGUSR2,
    "stop": signal.SIGSTOP,
    "flip": signal.SIGKILL,
}
TRIALS = {
    "kill": 60,
    "crash": 40,
    "term": 20,
    "int": 20,
    "usr2": 20,
    "stop": 20,
    "flip": 20,
    "soak": 5,
}
REQUESTS = ("term", "int", "usr2")
SOAK_FAULTS = 10
ESSENTIAL = {  # who is disturbed in a soak: a start ends of it, so that the next fault has its turn
    "kill": ("parent", "rank", "worker"),
    "term": ("parent", "rank"),
    "stop": ("rank",),
    "flip": ("parent", "rank", "worker"),
}
STOPPED = 75
WATCHDOG_S = 10.0
GONE_S = 20.0  # until the last process of a start is gone, the writer of a checkpoint included
MAX_CALM_STARTS = 4  # after the last fault


@dataclass
class Trial:
    """What became of one trial.

    Attributes:
        what: the faults, in words.
        problems: why it is not survived; empty if it is.
        notice_s: for each fault, from it to the end of the last process; without faults that the
            run has outlived.
        lost: for each start but the first, iterations that were done and are done again.
        codes: how the starts ended.
        litter: temporary files and shared memory of killed processes.
        seconds: of all starts together.
    """

    what: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notice_s: list[float] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    litter: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Victim(NamedTuple):
    """What is done in one start, and to a process of which role."""

    fault: str
    role: str


def trial(
    folder: Path,
    fault: str,
    *,
    seed: int,
    iterations: int,
    quiet: Reference,
    roles: Sequence[str] = (),
) -> Trial:
    """Disturb a run, start it again until it has finished, and look at what it has left.

    Args:
        folder: to be made, for all that the trial writes.
        fault: one of `TRIALS`.
        seed: of all that is random.
        iterations: of the run.
        quiet: what an undisturbed run says.
        roles: of `ROLES`: of the processes that are disturbed, one a start; empty for one or two
            at random.
    """
    rng = random.Random(f"{fault} {seed}")
    runner, result = Runner(folder, iterations=iterations), Trial()
    victims = [Victim(fault, role) for role in roles] or _victims(fault, rng)
    begin, done_before = time.monotonic(), None
    for _ in range(len(victims) + MAX_CALM_STARTS):
        done_before = _start(runner, result, rng, victims, quiet, done_before)
        if result.codes[-1] == 0 or result.problems:
            break
    result.seconds = time.monotonic() - begin
    result.litter = runner.litter()
    if result.codes[-1] != 0 and not result.problems:
        result.problems.append(f"did not finish in {len(result.codes)} starts")
    if not result.problems:
        result.problems += differences(runner, quiet)
    return result


def _victims(fault: str, rng: random.Random) -> list[Victim]:
    """Return at random what is done in the starts of a trial."""
    if fault == "soak":
        faults = rng.choices(tuple(ESSENTIAL), k=SOAK_FAULTS)
        return [Victim(each, rng.choice(ESSENTIAL[each])) for each in faults]
    faults = [fault] * (1 if rng.random() < 0.7 else 2)
    fixed = {"stop": "rank", "crash": "all"}
    return [Victim(each, fixed.get(each) or rng.choice(ROLES)) for each in faults]


def _start(
    runner: Runner,
    result: Trial,
    rng: random.Random,
    victims: list[Victim],
    quiet: Reference,
    done_before: int | None,
) -> int:
    """Do one start of the command, with the next victim; return how many iterations it ended at."""
    victim = victims[0] if victims else None
    fault = victim.fault if victim else ""
    before = {p.name for p in find_all(runner.run / "checkpoints")} - runner.damaged
    # a request to stop is promised to be heard from the first step on; kill -9 asks nobody
    while_starting = fault in ("kill", "flip") and rng.random() < 0.25
    most = 0.9 if fault in REQUESTS else 1.0
    moment = Moment(
        after_s=rng.uniform(0, quiet.first_step_s) if while_starting else None,
        share_done=rng.uniform(0, min(most, 1.6 / max(1, len(victims)))),
        delay_s=rng.uniform(0, 0.05),
        done_at_start=runner.progress(),
        at_checkpoint=fault == "crash",
    )
    sent: float | None = None
    stopped_rank, begin = -1, time.monotonic()
    with runner.started([f"launch.watchdog_s={WATCHDOG_S}"]) as process:
        while process.poll() is None and time.monotonic() - begin < HANG_S:
            time.sleep(0.005)
            if not victim or sent or not moment.has_come(runner, time.monotonic() - begin):
                continue
            of_role = sorted(
                pid for pid, is_a in runner.processes().items() if victim.role in (is_a, "all")
            )
            if of_role:
                pid, sent = rng.choice(of_role), time.monotonic()
                stopped_rank = runner.rank_of(pid) if fault == "stop" else -1
                for each in of_role if victim.role == "all" else [pid]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(each, FAULTS[fault])
        code = process.poll()
        if code is None:
            result.problems.append(f"hangs; processes {runner.processes()}")
        while runner.processes() and time.monotonic() - begin < HANG_S + GONE_S:
            time.sleep(0.01)
        over = time.monotonic()
        if runner.processes():
            result.problems.append(f"left processes {runner.processes()}")
    result.codes.append(-1 if code is None else code)
    resumed = _resumed_at(runner.log())
    if done_before is not None and resumed is not None:
        result.lost.append(max(0, done_before - resumed))
    if sent and victim:
        victims.pop(0)
        result.what.append(f"{fault} {victim.role} at {sent - begin:.2f} s")
        if code != 0:
            result.notice_s.append(over - sent)
        if fault == "flip" and code != 0:
            result.what[-1] += f", {runner.flip(rng)}"
    new = {p.name for p in find_all(runner.run / "checkpoints")} - before
    if code is not None:
        result.problems += _end_problems(runner, code, victim if sent else None, stopped_rank, new)
    return runner.progress()


def _end_problems(
    runner: Runner, code: int, victim: Victim | None, stopped_rank: int, new: set[str]
) -> list[str]:
    """Return what is wrong with how a start has ended.

    Args:
        runner: of the trial.
        code: its exit code.
        victim: what was done in it, None for nothing.
        stopped_rank: the rank that got a SIGSTOP, or -1.
        new: names of the checkpoints that it has saved.
    """
    if code == 0:
        return []
    if victim is None:
        return [f"start {runner.starts} ended with {code} undisturbed"]
    if victim.fault in REQUESTS:
        return _stop_problems(runner, code, victim.role, len(new))
    is_named = f"rank {stopped_rank} makes no progress: " in runner.log()
    if stopped_rank >= 0 and not (code == 1 and is_named):
        return [f"{code} when rank {stopped_rank} was stopped: {runner.log()}"]
    return []


@dataclass
class Moment:
    """When a start is disturbed: by its clock, or by what it has done of what was left to do.

    Attributes:
        after_s: seconds after its start; None goes by the iterations.
        share_done: of the iterations that were left at its start.
        delay_s: seconds after the iteration.
        done_at_start: iterations that are done.
        at_checkpoint: when the next checkpoint appears from then on.
    """

    after_s: float | None
    share_done: float
    delay_s: float
    done_at_start: int
    at_checkpoint: bool = False
    _since: float | None = None
    _there: frozenset[str] | None = None

    def has_come(self, runner: Runner, now_s: float) -> bool:
        """Say whether the moment has come, `now_s` after the start."""
        if self.after_s is not None:
            return now_s >= self.after_s
        if self._since is None:
            done, left = runner.progress(), runner.iterations - self.done_at_start
            # what is in the file may be of the start before: anything else is of this one
            if done != self.done_at_start and done >= self.done_at_start + self.share_done * left:
                self._since = now_s
            return False
        if self.at_checkpoint:
            folder = runner.run / "checkpoints"
            names = frozenset(path.name for path in find_all(folder, with_trained=True))
            there, self._there = self._there, names
            if there is None or names <= there:
                return False
            self._since, self.at_checkpoint = now_s, False
        return now_s - self._since >= self.delay_s


def _stop_problems(runner: Runner, code: int, role: str, num_new: int) -> list[str]:
    """Return what is wrong with a start that was asked to stop."""
    if code != STOPPED or role not in ("parent", "rank"):
        return [f"exit code {code} after a request to stop to a {role}"]
    found = re.search(r"stopped, run again to continue: (\d+) of", runner.log())
    newest = runner.digests().get("iteration")
    if found is None or newest != found[1]:
        return [f"stopped at {found and found[1]}, but the newest checkpoint is of {newest}"]
    if num_new == 0:
        return [f"stopped at {found[1]} without a new checkpoint"]
    return []


def _resumed_at(log: str) -> int | None:
    """Return after which iteration a start has gone on; None if it has not come so far."""
    found = re.search(r"continuing after iteration (\d+)", log)
    if found:
        return int(found[1])
    return 0 if re.search(r"^iter \d+/", log, re.MULTILINE) else None


def campaign(
    trials: Mapping[str, int], *, seed: int, iterations: int, folder: Path
) -> dict[str, list[Trial]]:
    """Run the trials of each fault; return what became of them.

    Args:
        trials: how many of each fault of `TRIALS`.
        seed: of the first trial of each; the others count up.
        iterations: of each run.
        folder: for all files.
    """
    quiet = reference(folder / "quiet", iterations=iterations)
    results: dict[str, list[Trial]] = {}
    for fault, count in trials.items():
        results[fault] = []
        for number in range(seed, seed + count):
            place = folder / f"{fault}_{number}"
            result = trial(place, fault, seed=number, iterations=iterations, quiet=quiet)
            results[fault].append(result)
            state = "; ".join(result.problems) or "survived"
            print(
                f"{fault} {number}: {', '.join(result.what)}; exits {result.codes}; "
                f"done twice {result.lost}; litter {result.litter}; {state}"
            )
            sys.stdout.flush()
    return results


def table(results: dict[str, list[Trial]]) -> str:
    """Return a table: worst time to notice, most iterations done twice, trials with litter."""
    lines = [
        f"{'fault':<6} {'trials':>6} {'survived':>8} {'faults':>6} {'worst notice_s':>14} "
        f"{'worst lost':>10} {'litter':>6}"
    ]
    for fault, trials in results.items():
        survived = sum(not each.problems for each in trials)
        faults = sum(len(each.what) for each in trials)
        notice = max((s for each in trials for s in each.notice_s), default=0.0)
        lost = max((n for each in trials for n in each.lost), default=0)
        litter = sum(bool(each.litter) for each in trials)
        lines.append(
            f"{fault:<6} {len(trials):>6} {survived:>8} {faults:>6} {notice:>14.1f} "
            f"{lost:>10} {litter:>6}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign as the command line says; 1 if a trial was not survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fault", choices=[*TRIALS, "all"], default="all")
    parser.add_argument("--trials", type=int, help=f"of each fault; if not given, {TRIALS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--keep", type=Path, help="a new folder for all files, to look at later")
    options = parser.parse_args(arguments)
    faults = list(TRIALS) if options.fault == "all" else [options.fault]
    trials = {fault: options.trials or TRIALS[fault] for fault in faults}
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = campaign(
            trials,
            seed=options.seed,
            iterations=options.iterations,
            folder=folder,
        )
    print(table(results))
    return int(any(each.problems for trials in results.values() for each in trials))


if __name__ == "__main__":
    raise SystemExit(main())

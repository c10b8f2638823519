"""Kill and signal a real run at random moments, start it again, and compare it with a quiet one.

    python tests/faults/campaign.py --fault kill --trials 20

A trial starts the command on two ranks with a loader worker each, waits a random time, sends a
random process of it the signal, and starts the same command again until it has finished. The trial
is survived if the last checkpoint, metrics.jsonl and TensorBoard say what they say after a run
that nobody disturbed, if no process and no file is left over, and if each start ended as it should.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from distrain.checkpoint_found import describe, find_all  # noqa: E402

FAULTS = {
    "kill": signal.SIGKILL,
    "term": signal.SIGTERM,
    "int": signal.SIGINT,
    "usr2": signal.SIGUSR2,
}
TRIALS = {"kill": 100, "term": 20, "int": 20, "usr2": 20}
ROLES = ("parent", "rank", "worker", "writer")
TOKEN = "DISTRAIN_FAULT_TRIAL"  # in the environment of every process of a trial, and of no other
CLOCK = ("perf/", "gpu/", "memory/", "straggler/")
STOPPED = 75
GONE_S = 20.0  # until the last process of a start is gone, the writer of a checkpoint included
HANG_S = 120.0  # a start that takes longer hangs
MAX_STARTS = 6

CODE = '''
import os, time
import torch
from torch import nn
from distrain import HookBase


class Noisy(torch.utils.data.Dataset):
    """Points whose noise is drawn in __getitem__; loading one takes 0.1 ms."""

    def __len__(self):
        return 97

    def __getitem__(self, index):
        time.sleep(1e-4)
        x = torch.linspace(-1, 1, 97)[index].reshape(1) + 0.01 * torch.randn(1)
        return x, x**2


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Dropout(0.1), nn.Linear(32, 1)
        )

    def forward(self, x, y):
        return nn.functional.mse_loss(self.net(x), y)


class Progress(HookBase):
    """Notes in a file how many iterations are done, so that the campaign knows what was lost."""

    def __init__(self, pause_s=0.0):
        self._pause_s = pause_s

    def before_train(self):
        name = f"progress_{self.trainer.where.rank}"
        self._fd = os.open(os.path.join(os.environ["TMPDIR"], "..", name), os.O_RDWR | os.O_CREAT)

    def after_step(self):
        os.pwrite(self._fd, b"%8d" % self.trainer.iter_done, 0)
        time.sleep(self._pause_s)

    def after_train(self):
        os.close(self._fd)
'''

CONF = """
# @package _global_
defaults: [{override /schedule: cosine}]
run: {name: tiny}
model: {_target_: tiny.Net}
data: {batch_size: 16, workers: 1, seed_samples: true, train: {_target_: tiny.Noisy}}
optim: {lr: 0.05}
trainer: {max_iter: ITERATIONS, window: 5}
schedule: {warmup_iters: 10}
hooks:
  checkpoint: {period: 10}
  progress: {_target_: tiny.Progress, pause_s: 0.01}
launch: {ranks: 2}
"""


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
        litter: temporary files of killed processes, outside of the run's folder.
        seconds: of all starts together.
    """

    what: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notice_s: list[float] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    litter: list[str] = field(default_factory=list)
    seconds: float = 0.0


class Runner:
    """Starts the command in a folder of its own, and sees its processes.

    Args:
        folder: made here if it is not there; for the user's project, the run, temporary files.
        iterations: of the run.
    """

    def __init__(self, folder: Path, *, iterations: int) -> None:
        self.folder = folder
        self.iterations = iterations
        self.run = folder / "runs" / "tiny"
        self.temporary = folder / "tmp"
        (folder / "conf" / "experiment").mkdir(parents=True, exist_ok=True)
        self.temporary.mkdir(exist_ok=True)
        text = CONF.replace("ITERATIONS", str(iterations))
        (folder / "conf" / "experiment" / "tiny.yaml").write_text(text)
        (folder / "tiny.py").write_text(CODE)
        self.token = f"{TOKEN}={folder}"
        self.starts = 0

    @contextlib.contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """Start the command; kill what is left of it at the end of the `with`."""
        name, _, value = self.token.partition("=")
        env = {
            **os.environ,
            name: value,
            "TMPDIR": str(self.temporary),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "distrain", "--config-dir", "conf", "+experiment=tiny"]
        with open(self.folder / f"start_{self.starts}.log", "wb") as log:
            process = subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self.starts += 1
        try:
            yield process
        finally:
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()

    def log(self) -> str:
        """Return what the newest start has printed."""
        path = self.folder / f"start_{self.starts - 1}.log"
        return path.read_text(errors="replace")

    def processes(self) -> dict[int, str]:
        """Return the role of every living process of this trial by its id."""
        parents, commands = {}, {}
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/environ", "rb") as file:
                    if self.token.encode() not in file.read().split(b"\0"):
                        continue
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if stat[0] not in "ZX":
                parents[int(pid)], commands[int(pid)] = int(stat[1]), command
        roles: dict[int, str] = {}
        for pid in sorted(parents):
            if b"checkpoint_writer" in commands[pid]:
                roles[pid] = "writer"
            elif parents[pid] not in parents:
                roles[pid] = "parent"
            else:
                is_rank = parents[parents[pid]] not in parents
                roles[pid] = "rank" if is_rank else "worker"
        return roles

    def progress(self) -> int:
        """Return how many iterations the slower rank says are done; 0 before the first."""
        done = []
        for rank in range(2):
            try:
                done.append(int((self.folder / f"progress_{rank}").read_text() or 0))
            except (OSError, ValueError):
                done.append(0)
        return min(done)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl without what is measured on the clock."""
        try:
            lines = (self.run / "metrics.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        rows = [json.loads(line) for line in lines]
        return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Return the (step, value) pairs that TensorBoard shows for each scalar."""
        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every purge
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(self.run / "tensorboard"), {"scalars": 0})
        events.Reload()
        return {
            tag: [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]
            if not tag.startswith(CLOCK)
        }

    def digests(self) -> dict[str, str]:
        """Return the digests of the newest checkpoint, and its iteration; empty if it is bad."""
        found = find_all(self.run / "checkpoints")
        if not found:
            return {}
        newest = describe(found[-1])
        return {**newest.digests, "iteration": str(newest.iteration)} if newest.valid else {}

    def leftovers(self) -> list[str]:
        """Return the files in the run's folder that a finished run does not leave there."""
        hidden = [p for p in self.run.rglob("*") if p.name.startswith(".") or p.suffix == ".new"]
        return sorted(str(p.relative_to(self.run)) for p in hidden)

    def litter(self) -> list[str]:
        """Return what lies in the folder for temporary files, torch's own folder left out."""
        names = os.listdir(self.temporary)
        return sorted(name for name in names if not name.startswith("torchinductor_"))


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run says: see the methods of `Runner`."""

    digests: dict[str, str]
    rows: list[dict[str, Any]]
    curves: dict[str, list[tuple[int, float]]]
    seconds: float
    first_step_s: float


def reference(folder: Path, *, iterations: int) -> Reference:
    """Run the command undisturbed.

    Raises:
        RuntimeError: that has not worked; with what was printed.
    """
    runner = Runner(folder, iterations=iterations)
    begin, first = time.monotonic(), math.nan
    with runner.started() as process:
        while process.poll() is None and time.monotonic() - begin < HANG_S:
            if math.isnan(first) and runner.progress():
                first = time.monotonic() - begin
            time.sleep(0.01)
        seconds = time.monotonic() - begin
        if process.poll() != 0:
            raise RuntimeError(f"the undisturbed run ended with {process.poll()}: {runner.log()}")
    if runner.leftovers() + runner.litter():
        raise RuntimeError(f"the undisturbed run has left {runner.leftovers() + runner.litter()}")
    return Reference(runner.digests(), runner.rows(), runner.curves(), seconds, first)


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
        fault: one of `FAULTS`.
        seed: of all that is random.
        iterations: of the run.
        quiet: what an undisturbed run says.
        roles: of `ROLES`: of the processes that are disturbed, one a start; empty for one or two
            at random.
    """
    rng = random.Random(f"{fault} {seed}")
    runner, result = Runner(folder, iterations=iterations), Trial()
    victims = [*(roles or rng.choices(ROLES, k=1 if rng.random() < 0.7 else 2))]
    begin, done_before = time.monotonic(), None
    for _ in range(MAX_STARTS):
        role = victims.pop(0) if victims else None
        done_before = _start(runner, result, rng, fault, role, quiet, done_before)
        if result.codes[-1] == 0 or result.problems:
            break
    result.seconds = time.monotonic() - begin
    result.litter = runner.litter()
    if result.codes[-1] != 0 and not result.problems:
        result.problems.append(f"did not finish in {MAX_STARTS} starts")
    if not result.problems:
        result.problems += differences(runner, quiet)
    return result


def _start(
    runner: Runner,
    result: Trial,
    rng: random.Random,
    fault: str,
    role: str | None,
    quiet: Reference,
    done_before: int | None,
) -> int:
    """Do one start of the command; return how many iterations were done at its end."""
    is_stop = fault != "kill"
    stopped_before = {p.name for p in find_all(runner.run / "checkpoints")}
    # a request to stop is promised to be heard from the first step on; kill -9 asks nobody
    while_starting = not is_stop and rng.random() < 0.25
    moment = Moment(
        after_s=rng.uniform(0, quiet.first_step_s) if while_starting else None,
        share_done=rng.uniform(0, 0.9 if is_stop else 1.0),
        delay_s=rng.uniform(0, 0.05),
        done_at_start=runner.progress(),
    )
    sent: float | None = None
    begin = time.monotonic()
    with runner.started() as process:
        while process.poll() is None and time.monotonic() - begin < HANG_S:
            time.sleep(0.005)
            if role is None or sent or not moment.has_come(runner, time.monotonic() - begin):
                continue
            of_role = sorted(pid for pid, is_a in runner.processes().items() if is_a == role)
            if of_role:
                sent = time.monotonic()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(of_role), FAULTS[fault])
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
    if sent:
        result.what.append(f"{fault} {role} at {sent - begin:.2f} s")
        if code != 0:
            result.notice_s.append(over - sent)
    if sent and is_stop and code != 0:
        new = {p.name for p in find_all(runner.run / "checkpoints")} - stopped_before
        result.problems += _stop_problems(runner, code, role, len(new))
    elif code not in (0, None) and not (sent and not is_stop):
        result.problems.append(f"start {runner.starts} ended with {code} undisturbed")
    return runner.progress()


@dataclass
class Moment:
    """When a start is disturbed: by its clock, or by what it has done of what was left to do.

    Attributes:
        after_s: seconds after its start; None goes by the iterations.
        share_done: of the iterations that were left at its start.
        delay_s: seconds after the iteration.
        done_at_start: iterations that are done.
    """

    after_s: float | None
    share_done: float
    delay_s: float
    done_at_start: int
    _since: float | None = None

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
        return now_s - self._since >= self.delay_s


def _stop_problems(runner: Runner, code: int | None, role: str | None, num_new: int) -> list[str]:
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


def differences(runner: Runner, quiet: Reference) -> list[str]:
    """Return in what a finished run differs from an undisturbed one, one line each."""
    problems = []
    digests = runner.digests()
    for part in sorted({*quiet.digests, *digests}):
        if quiet.digests.get(part) != digests.get(part):
            problems.append(f"the final {part} differs")
    rows = runner.rows()
    if rows != quiet.rows:
        where = [
            a.get("iteration", b.get("iteration"))
            for a, b in zip(rows, quiet.rows, strict=False)
            if a != b
        ]
        text = f"{len(rows)} rows, not {len(quiet.rows)}; different first at {where[:1]}"
        problems.append(f"metrics.jsonl: {text}")
    curves = runner.curves()
    for tag in sorted({*curves, *quiet.curves}):
        if curves.get(tag) != quiet.curves.get(tag):
            steps = [step for step, _ in curves.get(tag, [])]
            problems.append(f"TensorBoard: {tag} has steps {steps}")
    if runner.leftovers():
        problems.append(f"left files {runner.leftovers()}")
    return problems


def campaign(
    trials: Mapping[str, int], *, seed: int, iterations: int, folder: Path
) -> dict[str, list[Trial]]:
    """Run the trials of each fault; return what became of them.

    Args:
        trials: how many of each fault of `FAULTS`.
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
        f"{'fault':<6} {'trials':>6} {'survived':>8} {'worst notice_s':>14} {'worst lost':>10} "
        f"{'litter':>6}"
    ]
    for fault, trials in results.items():
        survived = sum(not each.problems for each in trials)
        notice = max((s for each in trials for s in each.notice_s), default=0.0)
        lost = max((n for each in trials for n in each.lost), default=0)
        litter = sum(bool(each.litter) for each in trials)
        lines.append(
            f"{fault:<6} {len(trials):>6} {survived:>8} {notice:>14.1f} {lost:>10} {litter:>6}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign as the command line says; 1 if a trial was not survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fault", choices=[*FAULTS, "all"], default="all")
    parser.add_argument("--trials", type=int, help=f"of each fault; if not given, {TRIALS}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--keep", type=Path, help="a new folder for all files, to look at later")
    options = parser.parse_args(arguments)
    faults = list(FAULTS) if options.fault == "all" else [options.fault]
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

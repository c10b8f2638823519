"""The watchdog on real ranks: who is stuck is named, nobody is left, and no false alarm."""

import contextlib
import ctypes
import glob
import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import FORK, die_with

from distrain import HookBase, Trainer
from distrain.distributed.ranks import process_group
from distrain.errors import ConfigError, ExitCode
from distrain.heartbeat import Beat, Phase
from distrain.launch.agent import run_node
from distrain.launch.local import LocalLauncher
from distrain.launch.options import RankOptions
from distrain.launch.rendezvous import StaticRendezvous, listen
from distrain.launch.stall import Place, Progress, least_advanced, report
from distrain.launch.stop import StopRequest
from distrain.launch.watchdog import _is_waiting_for_other_node
from distrain.process.inspect import waits_in

LIMIT_S = 4


@dataclass
class Train:
    """Trains a line; at the sixth iteration rank 1 of the first attempt does `fault`."""

    run_dir: str
    fault: str = ""
    max_iter: int = 20
    step_s: float = 0.01

    def __call__(self) -> ExitCode:
        with contextlib.suppress(StopIteration):
            return self.train()
        return ExitCode.FINISHED

    def train(self) -> ExitCode:
        torch.set_num_threads(1)
        rank = os.environ["RANK"]
        Path(self.run_dir, f"pid_{rank}").write_text(str(os.getpid()))
        if self.fault == "clock":
            step_the_clock(int(rank))
        fault = Fault(self.fault) if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else Fault("")
        with process_group():
            model = torch.nn.Sequential(torch.nn.Linear(2, 1), Square())
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            trainer = Trainer(model, optimizer, self.batches(fault), hooks=[fault], window=10**6)
            with contextlib.suppress(StopIteration):
                trainer.train(0, self.max_iter)
            if self.fault == "leave" and fault.is_mine:
                raise StopIteration
        return ExitCode.FINISHED

    def batches(self, fault):
        for iteration in range(self.max_iter):
            time.sleep(self.step_s)
            if iteration == 6:
                Path(self.run_dir, "begun").touch()
                fault.in_data()
            yield torch.ones(4, 2)


class Square(torch.nn.Module):
    def forward(self, x):
        return (x**2).mean()


class Fault(HookBase):
    """What goes wrong on rank 1."""

    def __init__(self, name):
        self.name = name
        self.is_mine = os.environ.get("RANK") == "1"

    def in_data(self):
        if self.name == "nap" and self.is_mine:
            sleep_for_ever()

    def after_step(self):
        if self.trainer.iter != 5:
            return
        if self.name == "skip" and not self.is_mine:
            dist.barrier()
        if not self.is_mine:
            return
        if self.name == "os._exit":
            os._exit(0)
        if self.name == "sys.exit":
            sys.exit(0)
        if self.name in ("end", "leave"):
            raise StopIteration
        if self.name == "segv":
            ctypes.string_at(0)


def sleep_for_ever():
    subprocess.Popen(["sleep", "1000"])  # as a loader process that the rank waits for
    time.sleep(10**6)


def step_the_clock(rank):
    real, begin = time.time, time.monotonic()
    jump = 3600 if rank else -3600
    time.time = lambda: real() + jump * (int(10 * (time.monotonic() - begin)) % 2)


class Run:
    """A launcher in a process of its own."""

    def __init__(self, run, folder):
        self.folder = folder
        self.process = FORK.Process(target=self._main, args=(run, os.getpid()))
        self.process.start()

    def _main(self, run, parent):
        die_with(parent)
        os.dup2(os.open(self.folder / "stderr", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        try:
            outcome = repr(run())
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        (self.folder / "outcome").write_text(outcome)
        os._exit(0)

    def outcome(self, timeout_s=30):
        self.process.join(timeout_s)
        assert self.process.exitcode == 0, (self.folder / "stderr").read_text()
        return (self.folder / "outcome").read_text()

    def pid(self, rank):
        return int((self.folder / f"pid_{rank}").read_text())

    def log(self, rank):
        return (self.folder / "logs" / f"rank_{rank}.log").read_text()

    def wait_until_begun(self):
        deadline = time.monotonic() + 30
        while not (self.folder / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    runs = []

    def start(job, run=None, **launcher):
        launcher = LocalLauncher(start_method="fork", **launcher)
        runs.append(Run(run or (lambda: launcher.start(job)), tmp_path))
        return runs[-1]

    yield start
    pids = [int(path.read_text()) for path in tmp_path.glob("pid_*")]
    for run in runs:
        run.process.kill()
        run.process.join()
    time.sleep(0.2)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    for run in runs:
        assert not glob.glob(f"/dev/shm/distrain-beats-{run.process.pid}-*")
    assert not list((tmp_path / "logs").glob(".*"))


@pytest.mark.ranks
def test_a_stopped_rank_is_named_with_the_stacks_of_all(start, tmp_path):
    run = start(Train(str(tmp_path), max_iter=10**6), ranks=3, watchdog_s=LIMIT_S)
    run.wait_until_begun()
    os.kill(run.pid(1), signal.SIGSTOP)
    outcome = run.outcome()
    line, answer = outcome.split("\n", 1)
    stopped = re.match(
        r"RankFailed: rank 1 makes no progress: \d+ s in \w+ at iteration (\d+) \(stopped: ",
        line,
    )
    assert stopped, outcome
    # one of the two may have left the all_reduce that the other is still in
    waiting = re.findall(r"ranks? ([\d, ]+) waits? in backward at iteration (\d+)", line)
    assert {rank for ranks, _ in waiting for rank in ranks.split(", ")} == {"0", "2"}, outcome
    assert all(int(iteration) - int(stopped[1]) in (0, 1) for _, iteration in waiting), outcome
    assert line.endswith("logs/rank_1.log)")
    assert answer.startswith("rank 1 did not answer")
    for rank in (0, 2):
        assert "rank 1 makes no progress" in run.log(rank)
        assert "most recent call first" in run.log(rank)
        assert "_forward_backward" in run.log(rank)
    assert "did not answer" in run.log(1)


@pytest.mark.parametrize(
    ("wchan", "function"),
    [("0", ""), ("poll_schedule_timeout.constprop.0", "poll_schedule_timeout.constprop.0")],
)
def test_the_function_that_a_process_waits_in_is_whole(monkeypatch, wchan, function):
    monkeypatch.setattr("builtins.open", lambda path: io.StringIO(wchan))
    assert waits_in(1) == function


@pytest.mark.ranks
def test_a_rank_asleep_in_its_data_is_named_and_started_again(start, tmp_path):
    run = start(Train(str(tmp_path), "nap"), ranks=2, watchdog_s=LIMIT_S, max_restarts=1)
    assert run.outcome() == repr(ExitCode.FINISHED)
    assert re.search(
        r"rank 1 makes no progress: \d+ s in data at iteration 6; rank 0 waits in backward at "
        r"iteration 6 .*; starting again, 1 of 1",
        (tmp_path / "stderr").read_text(),
    )
    assert "sleep_for_ever" in run.log(1)
    assert re.search(r"its process \d+ \(sleep\): state S", run.log(1))
    assert "backward" in run.log(0)


@pytest.mark.ranks
def test_without_the_watchdog_nobody_notices(start, tmp_path):
    run = start(Train(str(tmp_path), "nap"), ranks=2, watchdog_s=0)
    run.wait_until_begun()
    run.process.join(2 * LIMIT_S)
    assert run.process.exitcode is None
    for _ in range(2):  # Ctrl-C, and again
        os.kill(run.process.pid, signal.SIGINT)
        time.sleep(0.7)
    assert "second Ctrl-C" in run.outcome()


@pytest.mark.ranks
def test_a_collective_that_one_rank_skips(start, tmp_path):
    run = start(Train(str(tmp_path), "skip"), ranks=2, watchdog_s=LIMIT_S)
    outcome = run.outcome()
    assert re.search(
        r"rank 0 makes no progress: \d+ s in hooks at iteration 5; rank 1 waits in backward at "
        r"iteration 6",
        outcome,
    ), outcome
    assert "in barrier" in outcome


@pytest.mark.ranks
def test_a_step_of_the_wall_clock_is_no_alarm(start, tmp_path):
    def launch():
        step_the_clock(0)
        # far more than a step takes on a loaded machine, far less than the steps of the clock
        return LocalLauncher(ranks=2, start_method="fork", watchdog_s=60).start(job)

    job = Train(str(tmp_path), "clock", max_iter=100, step_s=0.02)
    assert start(job, launch).outcome() == repr(ExitCode.FINISHED)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("os._exit", "its process left early by exit code 0"),
        ("sys.exit", r"the program left early by sys.exit\(0\)"),
        ("leave", "its job returned early, after 6 iterations"),
        ("segv", "its process was ended by SIGSEGV"),
    ],
)
def test_a_rank_that_leaves_early_is_named_and_not_a_survivor(start, tmp_path, fault, text):
    run = start(Train(str(tmp_path), fault), ranks=3, watchdog_s=None)
    outcome = run.outcome()
    assert re.match(f"RankFailed: rank 1 failed: {text}", outcome), outcome
    if fault == "segv":
        assert "Segmentation fault" in run.log(1)
        assert "string_at" in run.log(1)


@pytest.mark.ranks
def test_a_rank_that_ends_training_before_the_others(start, tmp_path):
    run = start(Train(str(tmp_path), "end"), ranks=3, watchdog_s=LIMIT_S)
    outcome = run.outcome()
    assert re.match(
        r"RankFailed: rank 1 makes no progress: \d+ s in end at iteration 6; "
        "ranks 0, 2 wait in backward at iteration 6",
        outcome,
    ), outcome


@pytest.mark.ranks
def test_of_two_nodes_both_name_the_rank_that_is_stuck(start, tmp_path):
    listener = listen()
    port = listener.getsockname()[1]
    job = Train(str(tmp_path), "nap")

    def node(number):
        def run():
            with StopRequest() as stop:
                return run_node(
                    job,
                    ranks=1,
                    log_dir=tmp_path / "logs",
                    stop=stop,
                    options=RankOptions(start_method="fork", watchdog_s=LIMIT_S),
                    rendezvous=StaticRendezvous(
                        nodes=2,
                        node_rank=number,
                        endpoint=f"127.0.0.1:{port}" if number else listener,
                    ),
                )

        return run

    (tmp_path / "other").mkdir()
    first, second = start(job, node(0)), Run(node(1), tmp_path / "other")
    listener.close()
    for run in (first, second):
        assert "RankFailed: rank 1 makes no progress" in run.outcome()
        assert "; rank 0 waits in backward at iteration 6" in run.outcome()


def beats(*places):
    """Return beats from (iteration, phase) of ranks 0, 1, ..., at any time."""
    beats.calls += 1
    return {r: Beat(i, phase, float(beats.calls), False) for r, (i, phase) in enumerate(places)}


beats.calls = 0


def watched(progress, last, seconds, since):
    """Look every half second for a time in which nobody beats; return the places."""
    for half in range(1, 2 * seconds + 1):
        progress.update(last, since + half / 2)
    return progress.places()


def test_the_adaptive_limits():
    progress = Progress([0], watchdog_s=None)
    last = beats((0, Phase.START))
    progress.update(last, 1000.0)
    assert progress.limit_s(0) == 600
    assert not watched(progress, last, 599, 1000)[0].is_overdue
    assert watched(progress, last, 2, 1599)[0].is_overdue
    for now_s, step, phase, limit_s in [
        (2000, 4, Phase.FORWARD, 600),  # the first step
        (2001, 5, Phase.DATA, 600),  # nothing known yet of an ordinary one
        (2002, 6, Phase.DATA, 60),  # 1 s
        (2003, 6, Phase.HOOKS, 600),
        (2004, 6, Phase.SAVING, 600),
        (2005, 7, Phase.EVALUATION, 600),
        (2006, 7, Phase.BACKWARD, 60),
        (2007, 7, Phase.END, 600),
    ]:
        progress.update(beats((step, phase)), now_s)
        assert progress.limit_s(0) == limit_s, (step, phase)
    slow = Progress([0], watchdog_s=None)
    for step in range(4):
        watched(slow, beats((step, Phase.FORWARD)), 4, 4 * step)
    assert slow.limit_s(0) == 200  # 50 steps of 4 s
    watched(slow, beats((4, Phase.SAVING)), 100, 16)
    watched(slow, beats((5, Phase.FORWARD)), 4, 116)
    assert slow.limit_s(0) < 200  # a long time to save is no long step


def test_a_given_limit_holds_everywhere():
    progress = Progress([0], watchdog_s=3)
    for phase in list(Phase)[1:]:
        progress.update(beats((0, phase)), 0.0)
        assert progress.limit_s(0) == 3


def test_time_in_which_nobody_watched_does_not_count():
    progress = Progress([0], watchdog_s=60)
    last = beats((3, Phase.DATA))
    progress.update(last, 0.0)
    progress.update(last, 100_000.0)  # the job was suspended, the agent too
    assert progress.places()[0].silent_s == 2
    assert watched(progress, last, 59, 100_000)[0].is_overdue


def test_a_job_that_does_not_beat_is_not_watched():
    progress = Progress([0, 1], watchdog_s=3)
    last = {rank: Beat(0, Phase.NONE, 0.0, rank == 1) for rank in (0, 1)}
    assert watched(progress, last, 10, 0) == []
    progress.update(beats((0, Phase.START)), 10.5)
    assert watched(progress, {1: last[1]}, 4, 10.5)[1].is_overdue  # from then on it should


def place(rank, iteration, phase, silent_s=9.0, *, is_overdue=True, finished=False, state="S"):
    return Place(rank, iteration, phase, finished, silent_s, is_overdue, state)


def test_who_is_least_advanced():
    waiting = [place(r, 57, Phase.BACKWARD) for r in (0, 2, 3)]
    assert [p.rank for p in least_advanced([*waiting, place(1, 57, Phase.DATA)])] == [1]
    assert [p.rank for p in least_advanced([*waiting, place(1, 56, Phase.HOOKS)])] == [1]
    assert [
        p.rank for p in least_advanced([*waiting, place(1, 57, Phase.BACKWARD, state="T")])
    ] == [1]
    assert [p.rank for p in least_advanced([*waiting, place(1, 57, Phase.BACKWARD)])] == [
        0,
        2,
        3,
        1,
    ]
    assert [
        p.rank for p in least_advanced([*waiting, place(1, 57, Phase.BACKWARD, finished=True)])
    ] == [1]
    assert [p.rank for p in least_advanced([*waiting, place(1, 57, Phase.END)])] == [1]  # too early
    done = place(1, 60, Phase.END, finished=True)
    assert [p.rank for p in least_advanced([place(0, 59, Phase.BACKWARD), done])] == [0]
    assert [p.rank for p in least_advanced([place(0, 60, Phase.END), done])] == [0]
    assert least_advanced([done]) == least_advanced([]) == []


def test_the_report():
    others = [place(r, 57, Phase.BACKWARD) for r in (0, 2, 3, 4)]
    assert (
        report([place(1, 57, Phase.DATA, 61.2, state="T")], others)
        == "rank 1 makes no progress: 61 s in data at iteration 57 (stopped: state T); "
        "ranks 0, 2-4 wait in backward at iteration 57"
    )
    assert (
        report([place(0, 0, Phase.START, 601), place(1, 0, Phase.START, 700)], [])
        == "ranks 0, 1 make no progress: 601 s in start"
    )
    gone = place(2, 9, Phase.END, finished=True)
    assert (
        report([place(0, 0, Phase.NONE)], [gone, place(1, 8, Phase.DATA, 0.1)])
        == "rank 0 makes no progress: 9 s before its start; rank 1 is in data at iteration 8; "
        "rank 2 has finished in end at iteration 9"
    )


def test_waiting_for_another_node_is_waiting_for_other_node():
    stuck = [place(0, 57, Phase.BACKWARD)]
    saving = [place(4, 56, Phase.SAVING, is_overdue=False)]
    behind, ahead = [place(4, 57, Phase.DATA)], [place(4, 58, Phase.DATA)]
    late = [place(4, 57, Phase.BACKWARD, is_overdue=False)]
    assert _is_waiting_for_other_node(stuck, {1: ahead, 2: saving})
    assert _is_waiting_for_other_node(stuck, {1: behind})  # that node speaks of it
    assert _is_waiting_for_other_node(stuck, {1: late})
    assert not _is_waiting_for_other_node(
        stuck, {1: ahead, 2: [place(5, 57, Phase.BACKWARD)], 3: []}
    )


def test_a_limit_below_zero_is_refused():
    with pytest.raises(ConfigError, match=r"watchdog_s=-1: expected a finite number >= 0"):
        LocalLauncher(watchdog_s=-1)

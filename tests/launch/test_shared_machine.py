"""launch=local on a machine that others use too: NVML is a stand-in, the ranks are on the CPU."""

import contextlib
import ctypes
import getpass
import json
import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from stand_in import LIBRARY, Driver
from test_launch import Command, wait_for, what_agents_import  # noqa: F401 - a fixture

from distrain.errors import ConfigError, ExitCode, RankFailed, RunRefused, StoppedBeforeStart
from distrain.gpus import shared_files
from distrain.launch import gpus, lease_watch
from distrain.launch.local import LocalLauncher

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.ranks


@dataclass
class Hold:
    """Notes what a rank sees, and holds its GPU until a file `end` is there or a stop is asked."""

    run_dir: str
    fails_at_first: bool = False
    fails_to_stop: bool = False

    def __call__(self) -> ExitCode:
        asked = []
        signal.signal(signal.SIGUSR2, lambda number, frame: asked.append(number))
        rank, returns = os.environ["RANK"], os.environ.get("DISTRAIN_RETURNS", "0")
        seen = {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid()}
        note = Path(self.run_dir, f"rank-{rank}-{returns}.json")
        note.with_suffix(".new").write_text(json.dumps(seen))
        note.with_suffix(".new").rename(note)
        is_first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
        if self.fails_at_first and is_first:
            raise OSError("flaky")
        while not Path(self.run_dir, "end").exists():
            if asked and self.fails_to_stop and is_first:
                raise OSError("disk full")
            if asked:
                return ExitCode.STOPPED
            time.sleep(0.01)
        return ExitCode.FINISHED


class Run:
    """A command that runs a job."""

    def __init__(self, machine, name, fails_at_first=False, fails_to_stop=False, **settings):
        self.folder = machine.folder / name
        self.folder.mkdir()
        job = Hold(str(self.folder), fails_at_first, fails_to_stop)
        self._console = self.folder / "console"

        def main():
            ctypes.CDLL(str(machine.library))  # pynvml finds it by its name
            return LocalLauncher(start_method="fork", **settings).start(job)

        self.command = Command(main, self._console)
        machine.runs.append(self)

    def rank(self, rank=0, returns=0):
        """Return what a rank noted, which is waited for."""
        path = self.folder / f"rank-{rank}-{returns}.json"
        wait_for(path)
        return json.loads(path.read_text())

    def said(self, text):
        """Wait for a line on the console; return it."""
        deadline_s = time.monotonic() + 60
        while True:
            lines = self._console.read_text().splitlines() if self._console.exists() else []
            for line in lines:
                if text in line:
                    return line
            assert time.monotonic() < deadline_s, (text, lines)
            time.sleep(0.02)

    def end(self):
        """Let the ranks finish; return the result."""
        (self.folder / "end").touch()
        return self.command.result(60)


class Machine:
    """A machine with GPUs."""

    def __init__(self, folder, library):
        self.folder, self.library, self.runs = folder, library, []
        self.driver = Driver(folder / "says")

    def has(self, num, **values):
        """Set what the driver says."""
        for gpu in range(num):
            values.setdefault(f"gpu{gpu}_uuid", f"GPU-{gpu}")
            values.setdefault(f"gpu{gpu}_name", "Card")
        self.driver.says(gpus=num, **values)

    def start(self, name, **settings):
        return Run(self, name, **settings)


@pytest.fixture
def machine(libraries, tmp_path, monkeypatch):
    monkeypatch.setenv(shared_files.VARIABLE, str(tmp_path / "leases"))
    monkeypatch.setenv("NVML_STAND_IN", str(tmp_path / "says"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(gpus, "POLL_S", 0.05)
    monkeypatch.setattr(gpus, "_RETRY_S", 0.05)
    found = Machine(tmp_path, libraries / "new" / LIBRARY)
    yield found
    for run in found.runs:
        with contextlib.suppress(ProcessLookupError):
            run.command.signal(signal.SIGKILL)
        run.command.join()


def test_idle_gpus_are_taken_and_nothing_starts_without(machine):
    machine.has(3, gpu1_processes="1:1000000 999999999:5")
    first = machine.start("first", ranks=2)
    assert first.rank(0)["gpus"] == first.rank(1)["gpus"] == "GPU-0,GPU-2"
    assert first.said("starting 2 ranks on GPUs 0, 2")
    kind, message = machine.start("second", ranks=1).command.result()
    assert kind is ConfigError
    assert re.fullmatch(
        r"launch.ranks=1: expected 1 idle GPU, found 0 of 3; "
        rf"GPUs 0, 2: held by \w+ \({first.folder}, process {first.command.pid}, since [^;]*\); "
        r"GPU 1: used by process 1( of \w+)? and process 999999999; "
        r"launch.wait=true waits for them, launch.share=true runs alongside them",
        message,
    )
    kind, message = machine.start("too-many", ranks=4, wait=True).command.result()
    assert message.startswith("launch.ranks=4: expected at most 3, one per visible GPU; ")
    beside = machine.start("beside", ranks=1, share=True)
    assert beside.rank()["gpus"] is None
    assert (beside.end(), first.end()) == (ExitCode.FINISHED, ExitCode.FINISHED)
    kind, message = machine.start("all").command.result()  # the number of ranks does not change
    assert "launch.ranks=null: expected 3 idle GPUs, found 2 of 3; GPU 1: " in message
    assert ", launch.ranks=2 takes fewer, " in message


def test_all_visible_gpus_are_taken_as_they_are(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    machine.has(3, gpu1_processes="1:5", gpu2_memory_total=100 << 30, gpu2_memory_used=2 << 30)
    run = machine.start("run")
    assert run.rank(1)["gpus"] == "2,0"
    assert run.end() == ExitCode.FINISHED
    machine.has(3, gpu2_memory_total=100 << 30, gpu2_memory_used=3 << 30)  # more than 2 %
    kind, message = machine.start("refused").command.result()
    assert "found 1 of 2; GPU 2: memory in use by an unknown process; " in message


def test_without_visible_gpus_there_are_no_leases(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine.has(3)
    run = machine.start("run", ranks=1, wait=True, nice=True)
    assert run.rank()["gpus"] == ""
    assert run.end() == ExitCode.FINISHED
    assert not (machine.folder / "leases").exists()


def test_a_driver_that_fails_is_reported_and_a_nice_run_does_not_come_back_on_cpus(
    machine, monkeypatch
):
    monkeypatch.setattr(gpus, "_DRIVER", "/dev/null")
    machine.has(1)
    nice = machine.start("nice", nice=True)
    nice.rank()
    other = machine.start("other", wait=True)
    other.said("place 1 of 1")
    (machine.folder / "says").unlink()
    kind, message = nice.command.result()
    assert kind is ConfigError
    assert message.startswith("launch.nice=true: the GPUs have vanished while the run waited; its")
    (other.folder / "end").touch()
    other.command.signal(signal.SIGTERM)
    run = machine.start("run", ranks=1)
    run.said("no leases are taken: the GPUs cannot be read: Driver Not Loaded")
    run.rank()
    assert run.end() == ExitCode.FINISHED


def test_a_start_without_gpus_because_none_can_be_used_is_reported(machine):
    machine.has(2, gpu0_lost=1, gpu1_mig=1)
    run = machine.start("run")
    run.said("no leases are taken: 2 GPUs here, and none can be used: each is lost, not permitted")
    run.rank()
    assert run.end() == ExitCode.FINISHED


def test_a_mig_device_is_taken_not_its_gpu(machine):
    machine.has(
        1, gpu0_mig=1, **{"gpu0_mig0.uuid": "MIG-aaaabbbbcccc", "gpu0_mig1.uuid": "MIG-1111"}
    )
    first = machine.start("first")
    assert first.rank()["gpus"] == "MIG-aaaabbbbcccc"
    assert first.said("starting 1 rank on GPU 0 MIG-aaaabbbb")
    second = machine.start("second", ranks=1)
    assert second.rank()["gpus"] == "MIG-1111"
    kind, message = machine.start("third", ranks=2).command.result()
    assert message.startswith("launch.ranks=2: expected at most 1, a process can use one MIG dev")
    assert (first.end(), second.end()) == (ExitCode.FINISHED, ExitCode.FINISHED)


def test_runs_wait_in_order_and_one_that_is_stopped_leaves_the_queue(machine):
    machine.has(1)
    first = machine.start("first", wait=True)
    first.rank()
    second = machine.start("second", wait=True)
    assert second.said("waiting for 1 idle GPU, place 1 of 1 in the queue; GPU 0: held by")
    third = machine.start("third", wait=True)
    assert third.said("place 2 of 2 in the queue")
    fourth = machine.start("fourth", wait=True)
    assert fourth.said("place 3 of 3 in the queue")
    third.command.signal(signal.SIGINT)
    kind, message = third.command.result()
    assert (kind, message) == (
        StoppedBeforeStart,
        "stopped while waiting for GPUs; nothing was started",
    )
    assert not (third.folder / "logs").exists()
    assert "the ranks save" not in (third.folder / "console").read_text()
    assert fourth.said("place 2 of 2 in the queue")
    assert fourth.said(f"; first in the queue: {_me()} ({second.folder}, ")
    kind, message = machine.start("fifth").command.result()
    assert f", for which 2 runs wait, first: {_me()} ({second.folder}, " in message
    assert first.end() == ExitCode.FINISHED
    second.rank()
    assert fourth.said(f"place 1 of 1 in the queue; GPU 0: held by {_me()} ({second.folder}, ")
    assert second.end() == ExitCode.FINISHED
    fourth.rank()
    assert fourth.end() == ExitCode.FINISHED


def test_a_running_run_restores_leases_that_were_removed(machine):
    machine.has(1)
    first = machine.start("first")
    first.rank()
    (machine.folder / "leases").rename(machine.folder / "moved")
    wait_for(machine.folder / "leases" / "gpu-GPU-0")
    kind, message = machine.start("second").command.result()
    assert f"GPU 0: held by {_me()} ({first.folder}, " in message
    assert first.end() == ExitCode.FINISHED


def test_a_waiting_run_outlives_the_directory_of_the_leases(machine):
    machine.has(1, gpu0_processes="")
    first = machine.start("first", wait=True)
    first.rank()
    second = machine.start("second", wait=True)
    second.said("place 1 of 1")
    directory = machine.folder / "leases"
    machine.has(1, gpu0_processes="999999999:5")  # until the lease is restored
    directory.rename(machine.folder / "moved")
    directory.write_text("")  # for a while nothing can be created there
    assert first.said("for the leases of GPUs; remove it; the run goes on")
    assert second.said("waiting for 1 idle GPU; ").endswith("for the leases of GPUs; remove it")
    directory.unlink()
    third = machine.start("third", wait=True)
    assert third.said("place 2 of 2 in the queue")
    machine.has(1, gpu0_processes="")
    assert first.end() == ExitCode.FINISHED
    second.rank()
    assert second.end() == ExitCode.FINISHED
    third.rank()
    assert third.end() == ExitCode.FINISHED


def test_a_nice_run_goes_on_while_the_mutex_is_held_and_steps_aside_later(machine, monkeypatch):
    monkeypatch.setattr(lease_watch, "_PATIENCE_S", 0.1)
    machine.has(1)
    nice = machine.start("nice", nice=True)
    nice.rank()
    with shared_files.mutex(machine.folder / "leases"):
        assert nice.said("mutex: locked by another process for 0.1 s").endswith("; the run goes on")
    other = machine.start("other", wait=True)
    other.rank()
    assert other.end() == ExitCode.FINISHED
    nice.rank(returns=1)
    assert nice.end() == ExitCode.FINISHED


def test_a_waiting_run_whose_folder_is_removed_does_not_start(machine):
    machine.has(1)
    first = machine.start("first")
    first.rank()
    waiting = machine.start("waiting", wait=True)
    waiting.said("place 1 of 1")
    waiting.folder.rename(machine.folder / "moved")
    kind, message = waiting.command.result()
    assert kind is RunRefused
    assert message.startswith(f"run.dir={waiting.folder}: this folder is gone (deleted or moved ")
    assert first.end() == ExitCode.FINISHED


def test_a_signal_during_the_look_that_finds_idle_gpus_starts_nothing(machine, monkeypatch):
    look = gpus.queue.try_claim

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)
        return look(*arguments)

    machine.has(1)
    with monkeypatch.context() as patch:
        patch.setattr(gpus.queue, "try_claim", interrupted)
        run = machine.start("run", wait=True)
    assert run.command.result()[0] is StoppedBeforeStart
    assert not (run.folder / "logs").exists()
    other = machine.start("other")
    other.rank()
    assert other.end() == ExitCode.FINISHED


def _me():
    return getpass.getuser()


def test_a_killed_command_frees_its_gpus_when_its_ranks_have_ended(machine):
    machine.has(1)
    first = machine.start("first")
    rank = first.rank()["pid"]
    waiting = machine.start("waiting", wait=True)
    waiting.said("place 1 of 1")
    first.command.signal(signal.SIGKILL)
    waiting.rank()
    assert not Path(f"/proc/{rank}/exe").exists()  # dead, if not reaped yet
    assert waiting.end() == ExitCode.FINISHED


def test_restarted_ranks_hold_the_lease_again(machine):
    machine.has(1)
    run = machine.start("run", fails_at_first=True, max_restarts=1)
    run.said("starting again, 1 of 1")
    refused = machine.start("refused")
    kind, message = refused.command.result()
    assert "found 0 of 1" in message
    assert run.end() == ExitCode.FINISHED


def test_a_nice_run_steps_aside_and_comes_back(machine):
    machine.has(2)
    stays = machine.start("stays", ranks=1, nice=True)
    stays.rank()
    nice = machine.start("nice", ranks=1, nice=True)
    assert nice.rank()["gpus"] == "GPU-1"
    nice_too = machine.start("nice-too", ranks=1, nice=True, wait=True)
    nice_too.said("place 1 of 1")  # nice runs do not push each other out
    kind, message = machine.start("refused", ranks=1).command.result()
    assert "; launch.wait=true waits for them, and nice runs step aside, " in message
    other = machine.start("other", ranks=1, wait=True)
    assert other.rank()["gpus"] == "GPU-1"  # the one that began last has gone
    assert nice.said(f"stepping aside for {_me()} ({other.folder}, ")
    assert nice.said("place 2 of 2 in the queue")  # behind the nice one that waits
    assert stays.end() == ExitCode.FINISHED
    nice_too.rank()
    assert other.end() == ExitCode.FINISHED
    assert nice.rank(returns=1)["gpus"] == "GPU-1"
    last = machine.start("last", ranks=2, wait=True)
    last.rank(1)  # both step aside for it
    nice.said(f"GPUs 0, 1: held by {_me()} ({last.folder}, ")
    nice.command.signal(signal.SIGTERM)
    assert nice.command.result() == ExitCode.STOPPED
    assert nice.said("stopped while it waited for its turn; its state is saved: run it again")
    assert last.end() == ExitCode.FINISHED
    nice_too.rank(returns=1)
    assert nice_too.end() == ExitCode.FINISHED


def test_a_nice_run_that_fails_while_it_steps_aside_restarts_and_steps_aside(machine):
    machine.has(1)
    nice = machine.start("nice", nice=True, max_restarts=1, fails_to_stop=True)
    nice.rank()
    other = machine.start("other", wait=True)
    nice.said("starting again, 1 of 1")
    other.rank()
    assert other.end() == ExitCode.FINISHED
    nice.rank(returns=1)
    assert nice.end() == ExitCode.FINISHED
    last = machine.start("last", nice=True, fails_to_stop=True, max_restarts=1)
    last.rank()
    last.command.signal(signal.SIGTERM)  # after a signal there is no restart
    assert last.command.result()[0] is RankFailed


def test_one_rank_in_the_command_sees_the_gpu_that_it_has_leased(machine):
    machine.has(2, gpu1_name="Faster")  # by default CUDA counts it first
    run = machine.start("run", in_process=True)
    assert run.rank()["gpus"] == "GPU-0"
    assert run.end() == ExitCode.FINISHED


@pytest.mark.parametrize("names", ["7", "GPU-9", "foo", "0,0"])
def test_a_variable_that_names_no_gpu_does_not_start_on_cpus(machine, monkeypatch, names):
    machine.has(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    kind, message = machine.start("run").command.result()
    assert kind is ConfigError
    assert f"CUDA_VISIBLE_DEVICES={names}: expected some of the GPUs 0, 1, or their UU" in message


def test_a_refusal_names_what_was_asked_for(machine):
    machine.has(2)
    first = machine.start("first", in_process=True)
    first.rank()
    kind, message = machine.start("second", in_process=True).command.result()
    assert kind is ConfigError
    assert message.startswith("launch.in_process=true: expected 1 idle GPU, found 0 of 1; GPU 0: ")
    waiting = machine.start("waiting", ranks=2, wait=True)
    assert waiting.said("waiting for 2 idle GPUs")
    message = machine.start("third", ranks=1).command.result()[1]
    assert "expected 1 idle GPU, found 0 of 2, for which 1 run waits, first: " in message
    assert "takes fewer" not in message
    assert first.end() == ExitCode.FINISHED
    waiting.rank(1)
    assert waiting.end() == ExitCode.FINISHED


def test_a_signal_while_stepping_aside_is_a_stop(machine):
    from distrain.launch.stop import StopRequest

    with StopRequest(is_quiet=True) as stop:
        stop.is_wanted = lambda: True
        assert stop.poll() == stop.since is not None
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.signals, stop.at_once) == (["SIGINT"], False)  # not the second Ctrl-C
        stop.reset()
        assert stop.since is not None


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"wait": 1}, "wait=1: expected true or false"),
        ({"nice": True, "in_process": True}, "nice=true: expected false with launch.in_process"),
        ({"share": True, "wait": True}, "share=true: expected false with launch.wait=true or"),
    ],
)
def test_settings_that_do_not_work_together(settings, text):
    with pytest.raises(ConfigError, match=text):
        LocalLauncher(**settings)

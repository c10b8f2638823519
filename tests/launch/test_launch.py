"""Launchers with small jobs: who is blamed, what is left over, what a signal does."""

import contextlib
import ctypes
import importlib
import json
import multiprocessing
import os
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

from distrain.config.compose import build
from distrain.distributed.ranks import process_group
from distrain.errors import ConfigError, ExitCode, NonFiniteLoss, RankFailed
from distrain.launch import local
from distrain.launch.agent import run_node
from distrain.launch.external import ExternalLauncher, rank_env
from distrain.launch.local import LocalLauncher
from distrain.launch.options import RankOptions
from distrain.launch.rendezvous import StaticRendezvous, listen
from distrain.launch.stop import StopRequest

FORK = multiprocessing.get_context("fork")
ENV = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")


@dataclass
class Work:
    """Sums up a one of each rank, step by step; on one rank something happens at step 2."""

    run_dir: str
    what: str = "nothing"
    on_rank: int = 1
    steps: int = 4

    def __call__(self) -> ExitCode:
        asked = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            signal.signal(number, lambda number, frame: asked.append(number))
        rank = int(os.environ["RANK"])
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        note = {name: os.environ[name] for name in ENV} | {"pid": os.getpid()}
        Path(self.run_dir, f"rank-{rank}-{attempt}.json").write_text(json.dumps(note))
        with process_group() as where:
            print(f"hello from rank {rank}")
            for step in range(self.steps):
                if step == 2 and rank == self.on_rank:
                    self.happen(attempt)
                total = torch.ones(2) * torch.tensor([1.0, float(bool(asked))])
                dist.all_reduce(total)
                assert total[0] == where.world_size
                if total[1]:
                    return ExitCode.STOPPED
                time.sleep(0.02)
        return ExitCode.FINISHED

    def happen(self, attempt: str) -> None:
        match self.what:
            case "raise":
                raise ValueError("bad\nvalue")
            case "once" if attempt == "0":
                raise OSError("flaky")
            case "config":
                raise ConfigError("data.train=x: it is empty")
            case "nonfinite":
                raise NonFiniteLoss("loss is nan at iteration 2")
            case "exit":
                sys.exit(0)
            case "_exit":
                os._exit(0)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crash":
                ctypes.string_at(0)
            case "abort":
                os.abort()
            case "hang":
                helper = subprocess.Popen(["sleep", "1000"])
                Path(self.run_dir, "helper").write_text(str(helper.pid))
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
                time.sleep(1000)


class Command:
    """A process that runs a function as the command line would: forked, so that it starts at once.

    Attributes:
        pid: of the process.
    """

    def __init__(self, fn, console: Path) -> None:
        self._read, write = FORK.Pipe(duplex=False)
        self._console = console
        self._process = FORK.Process(target=self._main, args=(fn, write))
        self._process.start()
        write.close()
        self.pid = self._process.pid

    def _main(self, fn, write) -> None:
        fd = os.open(self._console, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        sys.stdout, sys.stderr = open(1, "w", 1), open(2, "w", 1)  # noqa: SIM115
        try:
            write.send(fn())
        except BaseException as error:
            write.send((type(error), str(error)))
        sys.stdout.flush()

    def result(self, timeout_s: float = 120):
        """Return what the function returned, or type and text of what it raised."""
        assert self._read.poll(timeout_s), "the command hangs"
        try:
            return self._read.recv()
        finally:
            self.join()

    def join(self) -> None:
        self._process.join(10)
        self._read.close()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


def catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.fixture(scope="module", autouse=True)
def what_agents_import():
    """Import once, and not in every forked command, what takes an agent 2 s."""
    importlib.import_module("torch._dynamo")


@pytest.fixture
def launch(tmp_path):
    """Return a function that starts a job in a command of its own."""
    commands = []

    def launch(what="nothing", *, steps=4, on_rank=1, **settings) -> Command:
        settings = {"ranks": 2, "start_method": "fork"} | settings
        job = Work(str(tmp_path), what, on_rank, steps)
        command = Command(lambda: LocalLauncher(**settings).start(job), tmp_path / "console")
        commands.append(command)
        return command

    yield launch
    pids = [json.loads(path.read_text())["pid"] for path in tmp_path.glob("rank-*.json")]
    for command in commands:
        with contextlib.suppress(ProcessLookupError):
            command.signal(signal.SIGKILL)
        command.join()
    deadline = time.monotonic() + 5
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"ranks are left over: {left}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(*paths: Path) -> None:
    """Wait until files are there and have something in them."""
    deadline = time.monotonic() + 20
    while not all(path.exists() and path.stat().st_size for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not come"
        time.sleep(0.02)


def ranks_of(folder: Path, attempt: int = 0) -> list[Path]:
    return [folder / f"rank-{rank}-{attempt}.json" for rank in range(2)]


# ordinary runs


def test_ranks_have_their_places_and_their_logs(launch, tmp_path):
    assert launch().result() is ExitCode.FINISHED
    notes = [json.loads(path.read_text()) for path in ranks_of(tmp_path)]
    assert [[note[name] for name in ENV] for note in notes] == [
        ["0", "0", "2", "2", "127.0.0.1"],
        ["1", "1", "2", "2", "127.0.0.1"],
    ]
    lines = (tmp_path / "console").read_text().splitlines()
    assert lines == ["distrain: starting 2 ranks", "hello from rank 0"]  # and nothing else
    assert (tmp_path / "logs" / "rank_1.log").read_text() == "hello from rank 1\n"
    assert sorted(os.listdir(tmp_path / "logs")) == ["rank_0.log", "rank_1.log"]


def test_logs_are_continued(launch, tmp_path):
    for _ in range(2):
        assert launch().result() is ExitCode.FINISHED
    assert (tmp_path / "logs" / "rank_1.log").read_text() == "hello from rank 1\n" * 2


def test_spawned_ranks(launch):
    assert launch(start_method="spawn").result() is ExitCode.FINISHED


def test_one_machine_listens_on_loopback_only(launch, tmp_path):
    command = launch(steps=10_000)
    wait_for(*ranks_of(tmp_path), tmp_path / "logs" / "rank_1.log")
    tree = [psutil.Process(command.pid), *psutil.Process(command.pid).children()]
    open_at = {
        connection.laddr.ip
        for process in tree
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert open_at == {"127.0.0.1"}
    command.signal(signal.SIGTERM)
    assert command.result() is ExitCode.STOPPED


# failures


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("raise", "ValueError: bad"),
        ("exit", "the program left early by sys.exit(0)"),
        ("_exit", "its process left early by exit code 0"),
        ("kill", "its process was ended by SIGKILL"),
        ("crash", "its process was ended by SIGSEGV"),
        ("abort", "its process was ended by SIGABRT"),
    ],
)
def test_the_rank_that_failed_is_named(launch, tmp_path, what, text, rank):
    kind, message = launch(what, on_rank=rank).result()
    log = tmp_path / "logs" / f"rank_{rank}.log"
    assert kind is RankFailed
    first, *rest = message.splitlines()
    assert first.startswith(f"rank {rank} failed: {text}")
    assert first.endswith(f"(log: {log})")
    assert message.count("Traceback") == (1 if what in ("raise", "exit") else 0)
    if what == "raise":
        assert rest[-2:] == ["ValueError: bad", "value"]
        assert "distrain/launch/" not in message  # our own frames tell the user nothing
        assert "ValueError: bad\nvalue\n" in log.read_text()
    if what in ("crash", "abort"):
        assert "in happen" in log.read_text()  # faulthandler's stack
    assert "Traceback" not in (tmp_path / "console").read_text()


@pytest.mark.parametrize("what", ["config", "nonfinite"])
def test_what_another_start_would_not_mend_is_not_started_again(launch, tmp_path, what):
    kind, message = launch(what, max_restarts=3).result()
    expected = {
        "config": (ConfigError, "data.train=x: it is empty"),
        "nonfinite": (NonFiniteLoss, "loss is nan at iteration 2"),
    }
    assert (kind, message) == expected[what]
    assert not ranks_of(tmp_path, attempt=1)[0].exists()


def test_a_rank_that_hangs_ends_with_the_one_that_failed(launch, tmp_path):
    command = launch("hang", on_rank=0, steps=10_000)
    wait_for(tmp_path / "helper")
    os.kill(json.loads(ranks_of(tmp_path)[1].read_text())["pid"], signal.SIGKILL)
    kind, message = command.result()
    assert kind is RankFailed
    assert message.startswith("rank 1 failed: its process was ended by SIGKILL")
    assert not is_running(int((tmp_path / "helper").read_text()))  # what the rank had started


def test_restart_after_a_failure(launch, tmp_path):
    assert launch("once", max_restarts=2).result() is ExitCode.FINISHED
    assert ranks_of(tmp_path, attempt=1)[0].exists()
    assert not ranks_of(tmp_path, attempt=2)[0].exists()
    console = (tmp_path / "console").read_text()
    assert console.count("rank 1 failed: OSError: flaky") == 1
    assert "starting again, 1 of 2\n" in console


def test_restarts_end(launch, tmp_path):
    kind, message = launch("raise", max_restarts=2).result()
    assert kind is RankFailed
    assert message.startswith("rank 1 failed: ValueError: bad")
    assert ranks_of(tmp_path, attempt=2)[0].exists()
    assert not ranks_of(tmp_path, attempt=3)[0].exists()


# signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_a_signal_asks_the_ranks_to_stop(launch, tmp_path, name):
    command = launch(steps=10_000)
    wait_for(*ranks_of(tmp_path), tmp_path / "logs" / "rank_1.log")
    command.signal(signal.Signals[name])
    assert command.result() is ExitCode.STOPPED
    assert f"distrain: {name}: the ranks save" in (tmp_path / "console").read_text()


def test_a_signal_that_comes_early_is_not_lost(launch, tmp_path):
    command = launch(steps=10_000, max_restarts=1)
    while not catches(command.pid, signal.SIGTERM):  # its ranks may not be there yet
        time.sleep(0.001)
    command.signal(signal.SIGTERM)
    assert command.result() is ExitCode.STOPPED


def test_a_second_ctrl_c_ends_the_ranks_at_once(launch, tmp_path):
    command = launch("hang", steps=10_000, max_restarts=1)
    wait_for(tmp_path / "helper")
    command.signal(signal.SIGINT)
    time.sleep(0.1)
    command.signal(signal.SIGINT)  # a terminal and a wrapper both pass it on: one request
    time.sleep(0.8)
    command.signal(signal.SIGINT)
    kind, message = command.result()
    assert kind is RankFailed
    assert message.startswith("the ranks were killed by a second Ctrl-C, without saving (logs: ")
    assert not is_running(int((tmp_path / "helper").read_text()))


def test_ranks_that_do_not_stop_are_killed_in_the_end(launch, tmp_path):
    command = launch("hang", steps=10_000, grace_s=0.5)
    wait_for(tmp_path / "helper")
    command.signal(signal.SIGTERM)
    kind, message = command.result()
    assert kind is RankFailed
    assert "they had not stopped after launch.grace_s=0.5 s" in message


def test_ranks_end_with_a_command_that_is_killed(launch, tmp_path):
    command = launch(steps=10_000)
    wait_for(*ranks_of(tmp_path), tmp_path / "logs" / "rank_1.log")
    command.signal(signal.SIGKILL)
    pids = [json.loads(path.read_text())["pid"] for path in ranks_of(tmp_path)]
    deadline = time.monotonic() + 3
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.since is not None
    assert stop.signals == ["SIGTERM"]
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# several nodes


def start_nodes(tmp_path, what="nothing", *, steps=4, **settings) -> list[Command]:
    """Start two agents with a rank each, that meet through a socket."""
    listener = listen()
    address = "{}:{}".format(*listener.getsockname())

    def agent(node_rank: int) -> ExitCode:
        with StopRequest() as stop:
            return run_node(
                Work(str(tmp_path), what, steps=steps),
                ranks=1,
                log_dir=tmp_path / "logs",
                stop=stop,
                options=RankOptions(start_method="fork", **settings),
                rendezvous=StaticRendezvous(
                    nodes=2,
                    node_rank=node_rank,
                    endpoint=listener if node_rank == 0 else address,
                ),
            )

    commands = [Command(lambda i=i: agent(i), tmp_path / f"console-{i}") for i in range(2)]
    listener.close()
    return commands


def nodes(tmp_path, what="nothing", **settings) -> list:
    return [command.result() for command in start_nodes(tmp_path, what, **settings)]


def test_two_nodes(tmp_path):
    assert nodes(tmp_path) == [ExitCode.FINISHED] * 2
    notes = [json.loads(path.read_text()) for path in ranks_of(tmp_path)]
    assert [[note[name] for name in ENV[:4]] for note in notes] == [
        ["0", "0", "2", "1"],
        ["1", "0", "2", "1"],
    ]


def test_a_failure_on_one_node_is_known_on_all(tmp_path):
    for kind, message in nodes(tmp_path, "raise"):
        assert kind is RankFailed
        assert message.startswith("rank 1 failed: ValueError: bad (log: ")
        assert message.endswith("ValueError: bad\nvalue")


def test_nodes_start_again_together(tmp_path):
    assert nodes(tmp_path, "once", max_restarts=1) == [ExitCode.FINISHED] * 2
    assert ranks_of(tmp_path, attempt=1)[0].exists()


def test_the_first_node_is_lost(tmp_path):
    commands = start_nodes(tmp_path, steps=10_000)
    wait_for(*ranks_of(tmp_path), tmp_path / "logs" / "rank_1.log")
    commands[0].signal(signal.SIGKILL)
    kind, message = commands[1].result()
    assert kind is RankFailed
    assert message.startswith(("rank 1 failed: ", "another node failed"))
    commands[0].join()


def test_a_node_that_does_not_come(tmp_path):
    with StopRequest() as stop, pytest.raises(RankFailed, match="1 of 2 nodes came in 0.2 s"):
        run_node(
            Work(str(tmp_path)),
            ranks=1,
            log_dir=tmp_path / "logs",
            stop=stop,
            options=RankOptions(),
            rendezvous=StaticRendezvous(nodes=2, endpoint=listen(), join_s=0.2),
        )


# one rank here


def test_one_rank_in_this_process(tmp_path):
    seen = {}

    class Job:
        run_dir = str(tmp_path)

        def __call__(self):
            seen.update({name: os.environ[name] for name in ENV}, pid=os.getpid())
            return ExitCode.FINISHED

    node = {"_target_": "distrain.launch.local.LocalLauncher", "in_process": True}
    assert build(node, "launch").start(Job()) is ExitCode.FINISHED
    assert [seen[name] for name in ENV] == ["0", "0", "1", "1", "127.0.0.1"]
    assert seen["pid"] == os.getpid()
    assert "RANK" not in os.environ


def test_an_exception_in_this_process_is_not_touched(tmp_path):
    class Job:
        run_dir = str(tmp_path)

        def __call__(self):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        LocalLauncher(in_process=True).start(Job())


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"ranks": 0}, "launch.ranks=0: expected an integer >= 1"),
        (
            {"in_process": True, "ranks": 2},
            "launch.ranks=2: expected 1 or null with launch.in_process=true",
        ),
        ({"max_restarts": -1}, "launch.max_restarts=-1: expected an integer >= 0"),
        ({"grace_s": 0}, "launch.grace_s=0: expected a finite number > 0"),
        ({"start_method": "thread"}, "launch.start_method=thread: expected one of fork, spawn"),
        ({"rank": 2}, "launch.rank: LocalLauncher has no such keyword; did you mean ranks"),
    ],
)
def test_settings_that_do_not_work(settings, text):
    node = {"_target_": "distrain.launch.local.LocalLauncher"} | settings
    with pytest.raises(ConfigError) as caught:
        build(node, "launch")
    assert str(caught.value).startswith(text)


# ranks that others have started


def external(tmp_path, what: str) -> list:
    """Return the results of two processes that are ranks by their environment."""
    with listen() as probe:
        port = str(probe.getsockname()[1])

    def rank(number: int) -> ExitCode:
        places = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        more = {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(places | more)
        return ExternalLauncher().start(Work(str(tmp_path), what))

    commands = [Command(lambda i=i: rank(i), tmp_path / f"console-{i}") for i in range(2)]
    return [command.result() for command in commands]


def test_external_ranks(tmp_path):
    assert external(tmp_path, "nothing") == [ExitCode.FINISHED] * 2
    assert (tmp_path / "console-0").read_text() == "hello from rank 0\n"
    assert (tmp_path / "logs" / "rank_1.log").read_text() == "hello from rank 1\n"


def test_only_the_external_rank_that_failed_shows_its_traceback(tmp_path):
    (kind, peer), (_, message) = external(tmp_path, "raise")
    assert kind is RankFailed
    assert peer.startswith("rank 0 failed: ")
    assert "Traceback" not in peer
    assert message.startswith("rank 1 failed: ValueError: bad")
    assert message.count("Traceback") == 1


def test_where_an_external_rank_learns_its_place():
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "6",
        "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "1234",
    }
    assert rank_env(slurm) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "6",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "1234",
    }
    with pytest.raises(ConfigError, match="MASTER_PORT not set; start it with torchrun, or"):
        rank_env({name: value for name, value in slurm.items() if name != "MASTER_PORT"})


@pytest.mark.parametrize(
    ("variables", "who"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "torchrun"),
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun, one of 4 tasks"),
    ],
)
def test_a_rank_does_not_start_ranks(monkeypatch, variables, who):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"a rank already .of {who}.*launch=external"):
        LocalLauncher().start(Work("nowhere"))


# GPUs


def test_no_driver_is_no_gpu(monkeypatch):
    pynvml = pytest.importorskip("pynvml")

    def fail():
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert local.count_gpus() == 0

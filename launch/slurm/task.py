"""Task of a SLURM job on each node: the agent of the node's ranks."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distrain.checks import number, whole
from distrain.errors import ConfigError, ExitCode, NonFiniteLoss, RankFailed, RunFailed
from distrain.files import atomic
from distrain.files.temp_folder import folder_of_processes
from distrain.launch import Job
from distrain.launch.failure import Failure, of_exception
from distrain.launch.options import RankOptions
from distrain.launch.slurm import queue
from distrain.launch.slurm.attempts import (
    NodeRecord,
    attempt_folder,
    is_stop_requested,
    list_nodes,
)
from distrain.launch.stop import StopRequest
from distrain.process import stdio
from distrain.process.garbage import importing
from distrain.run_layout import LOGS

_ENDPOINT_FILE = "endpoint"
_FIRST_PAUSE_S = 0.1
_MAX_PAUSE_S = 2.0  # hundreds of nodes read from one file server
_IMPORT_S = 600.0  # importing torch over a network file system takes minutes


@dataclass(frozen=True, kw_only=True)
class NodeOptions(RankOptions):
    """Options of launch=slurm and launch=allocation.

    Args:
        ranks: per node; None: one per GPU that was requested, else 1.
        join_s: seconds that the first node waits for the others.
        max_requeues: attempts in a row without a newer checkpoint after which the job is requeued.
    """

    ranks: int | None = None
    join_s: float = 60.0
    max_requeues: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks is not None:
            whole("ranks", self.ranks, least=1)
        number("join_s", self.join_s, above=0)
        whole("max_requeues", self.max_requeues, least=0)

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks on each node."""
        return self.ranks or 1

    def task(self, job: Job) -> NodeTask:
        """Return the task of each node."""
        return NodeTask(
            job=job,
            run_dir=Path(job.run_dir).absolute(),
            ranks=self.ranks_per_node,
            join_s=self.join_s,
            options=self.rank_options(),
        )


@dataclass(frozen=True, kw_only=True)
class NodeTask:
    """Runs a job's ranks on this node, together with those of the other nodes.

    A signal to it or to a rank requests that all ranks save and stop. submitit's own handlers act
    on the first node only, and pickle inside a handler: ours replace them. Leaving by `SystemExit`
    keeps submitit from writing a result.
    """

    job: Job  # run by every rank
    run_dir: Path  # absolute
    ranks: int  # per node
    join_s: float = 60.0  # seconds that the first node waits for the others
    options: RankOptions = RankOptions()  # of the ranks

    def __call__(self) -> None:
        """Run the ranks and leave the process.

        Raises:
            SystemExit: always; 0 if they finished or stopped in order. The node's record
                distinguishes the two: of several nonzero codes srun reports any one.
        """
        stdio.protect()
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # comes with each SIGTERM; submitit warns
        with StopRequest() as stop, folder_of_processes():
            record = NodeRecord(os.environ["SLURMD_NODENAME"])
            try:
                record.write(self.run_dir)
                if is_stop_requested(self.run_dir, queue.own_job_id()):
                    signal.raise_signal(signal.SIGUSR2)  # the job's may have come before us
                record.code = self._run(stop, record)
            except (ConfigError, NonFiniteLoss, RankFailed, RunFailed) as error:
                record.error = str(error)
                is_mistake = isinstance(error, ConfigError)
                record.code = ExitCode.BAD_CONFIG if is_mistake else ExitCode.FAILED
            except Exception as error:  # such as a store that was lost with its node
                rank = int(os.environ["SLURM_NODEID"]) * self.ranks
                failure = of_exception(error, rank=rank, log=str(self.run_dir / LOGS))
                record.failure = dataclasses.asdict(failure)
                record.error = f"{failure.line()}\n{failure.trace}"
                record.code = ExitCode.FAILED
            record.signals = list(dict.fromkeys(stop.signals))
            if record.code == ExitCode.STOPPED and stop.since is not None:
                record.stop_s = time.monotonic() - stop.since
            record.write(self.run_dir)
        if record.code not in (ExitCode.FINISHED, ExitCode.STOPPED):
            line = record.error.splitlines()[0]
            print(f"distrain: {record.node}: {line}", file=sys.stderr, flush=True)
            sys.exit(int(record.code))
        sys.exit(0)

    def _run(self, stop: StopRequest, record: NodeRecord) -> ExitCode:
        """Meet the other nodes and run the ranks."""
        nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
        node_rank = int(os.environ["SLURM_NODEID"])
        names = queue.hostnames(os.environ["SLURM_JOB_NODELIST"])
        if nodes > 1 and node_rank == 0:
            self._await_nodes(names, stop)
        options = self.options.with_start_method()  # before anything else imports torch
        with importing():
            from distrain.launch.agent import run_node
        from distrain.launch.rendezvous import StaticRendezvous

        def on_failure(cause: Failure) -> None:
            record.failure = dataclasses.asdict(cause)

        endpoint = None
        if nodes > 1:
            endpoint = self._publish(names) if node_rank == 0 else self._look_up(names[0], stop)
        if stop.since is not None:
            return ExitCode.STOPPED  # before a rank was started
        return run_node(
            self.job,
            ranks=self.ranks,
            log_dir=self.run_dir / LOGS,
            stop=stop,
            options=options,
            rendezvous=StaticRendezvous(
                nodes=nodes,
                node_rank=node_rank,
                endpoint=endpoint,
                run_id=attempt_folder(self.run_dir).name,
                join_s=_IMPORT_S,
            ),
            on_failure=on_failure,
        )

    def _await_nodes(self, names: list[str], stop: StopRequest) -> None:
        """Wait until every node has written its record."""
        deadline = time.monotonic() + self.join_s
        pauses = _pauses()
        while missing := sorted(set(names) - list_nodes(self.run_dir)):
            if stop.since is not None:
                return
            if time.monotonic() > deadline:
                raise RankFailed(
                    f"no record from {', '.join(missing)} in launch.join_s={self.join_s:g} s "
                    f"({len(names) - len(missing)} of {len(names)} nodes came); do they see "
                    f"run.dir={self.run_dir}? It must be on a file system that all nodes share"
                )
            time.sleep(next(pauses))

    def _publish(self, names: list[str]) -> socket.socket:
        """Listen on a free port of this node, and write its address for the other nodes."""
        from distrain.launch.rendezvous import listen

        listener = listen(_own_address(names[1]))
        host, port = listener.getsockname()[:2]
        path = attempt_folder(self.run_dir) / _ENDPOINT_FILE
        atomic.write(path, f"{host}:{port}".encode(), sync=False)
        return listener

    def _look_up(self, first: str, stop: StopRequest) -> str:
        """Return the address at which the first node listens."""
        path = attempt_folder(self.run_dir) / _ENDPOINT_FILE
        deadline = time.monotonic() + _IMPORT_S
        pauses = _pauses()
        while True:
            os.listdir(path.parent)  # makes a network file system refresh its cache
            if path.exists():
                return path.read_text()
            if stop.since is not None:
                return ""
            if time.monotonic() > deadline:
                raise RankFailed(f"the first node, {first}, published no port in {path}")
            time.sleep(next(pauses))


def _pauses() -> Iterator[float]:
    """Yield the seconds between two looks: exponential backoff with an upper bound."""
    pause_s = _FIRST_PAUSE_S
    while True:
        yield pause_s
        pause_s = min(1.5 * pause_s, _MAX_PAUSE_S)


def node_python(*flags: str) -> list[str]:
    """Return the command that starts python, with its flags, on a node."""
    # signals are ignored until the agent handles them: one that comes before must not kill it
    command = 'trap \'\' TERM USR1 USR2; exec "$0" "$@"'
    return ["sh", "-c", command, sys.executable, *flags]


def _own_address(peer: str) -> str:
    """Return the address of this node on the route to another one."""
    # a node's own name may resolve to a loopback address
    try:
        family, kind, _, _, address = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram socket: sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise RankFailed(f"the nodes cannot reach one another by name: {peer}: {error}") from error


def main(path: str) -> None:
    """Run the pickled task in a file, as launch=allocation does without submitit."""
    with open(path, "rb") as file:
        task: NodeTask = pickle.load(file)
    task()


if __name__ == "__main__":
    main(sys.argv[1])

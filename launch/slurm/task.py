"""What runs once on each node of a SLURM job: the agent of the node's ranks."""

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

from distrain.errors import ConfigError, ExitCode, NonFiniteLoss, RankFailed, RunFailed
from distrain.files import atomic
from distrain.files.temp_folder import folder_of_processes
from distrain.launch import Job
from distrain.launch.failure import Failure, of_exception
from distrain.launch.slurm import queue as slurm_queue
from distrain.launch.slurm.attempts import (
    NodeRecord,
    attempt_folder,
    is_asked_to_stop,
    nodes_there,
)
from distrain.launch.stop import StopRequest
from distrain.process import stdio
from distrain.run_layout import LOGS

_ENDPOINT_FILE = "endpoint"
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0  # hundreds of nodes ask one file server
_IMPORT_S = 600.0  # nodes that are there may take long to import torch over a network


@dataclass(frozen=True, kw_only=True)
class NodeTask:
    """Runs a job's ranks on the node it is called on, together with those of the other nodes.

    Any signal to it or to a rank asks all ranks to save and stop. submitit has handlers too, which
    act on the first node only, and pickle inside of a handler: ours replace them, and as we leave
    by `SystemExit` it writes no result, which would carry no attempt.

    Attributes:
        job: run by every rank.
        run_dir: absolute.
        ranks: on each node.
        max_restarts: how often a failed rank makes all ranks start again within this attempt.
        join_s: how long the first node waits for the others.
        grace_s: from a request to stop until ranks that are still there are killed.
        start_method: "fork" or "spawn" for the ranks; None: fork where that is sound.
        watchdog_s: how long a rank may make no progress, as in `run_node`.
    """

    job: Job
    run_dir: Path
    ranks: int
    max_restarts: int = 0
    join_s: float = 60.0
    grace_s: float = 120.0
    start_method: str | None = None
    watchdog_s: float | None = None

    def __call__(self) -> None:
        """Run the ranks and leave the process.

        Raises:
            SystemExit: always; 0 if they finished or stopped in order. The record of the node tells
                which: among several tasks that leave by other codes, srun picks one to report.
        """
        stdio.protect()
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # comes with each SIGTERM; submitit warns
        with StopRequest() as stop, folder_of_processes():
            record = NodeRecord(os.environ["SLURMD_NODENAME"])
            try:
                record.write(self.run_dir)
                if is_asked_to_stop(self.run_dir, slurm_queue.own_job_id()):
                    signal.raise_signal(signal.SIGUSR2)  # its own may have come too early
                record.code = self._run(stop, record)
            except (ConfigError, NonFiniteLoss, RankFailed, RunFailed) as error:
                record.error = str(error)
                is_mistake = isinstance(error, ConfigError)
                record.code = ExitCode.BAD_CONFIG if is_mistake else ExitCode.FAILED
            except Exception as error:  # such as a store that went with its node
                rank = int(os.environ["SLURM_NODEID"]) * self.ranks
                what = of_exception(error, rank=rank, log=str(self.run_dir / LOGS))
                record.failure = dataclasses.asdict(what)
                record.error = f"{what.line()}\n{what.trace}"
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
        names = slurm_queue.hostnames(os.environ["SLURM_JOB_NODELIST"])
        if nodes > 1 and node_rank == 0:
            self._await_nodes(names, stop)
        method = self.start_method or _start_method()
        from distrain.launch.agent import run_node

        def on_failure(cause: Failure) -> None:
            record.failure = dataclasses.asdict(cause)

        endpoint = None
        if nodes > 1:
            endpoint = self._publish(names) if node_rank == 0 else self._look_up(names[0], stop)
        if stop.since is not None:
            return ExitCode.STOPPED  # before anything was started
        return run_node(
            self.job,
            ranks=self.ranks,
            log_dir=self.run_dir / LOGS,
            stop=stop,
            nodes=nodes,
            node_rank=node_rank,
            endpoint=endpoint,
            run_id=attempt_folder(self.run_dir).name,
            max_restarts=self.max_restarts,
            grace_s=self.grace_s,
            join_s=_IMPORT_S,
            start_method=method,
            watchdog_s=self.watchdog_s,
            on_failure=on_failure,
        )

    def _await_nodes(self, names: list[str], stop: StopRequest) -> None:
        """Wait until every node has said that it is there."""
        deadline = time.monotonic() + self.join_s
        pauses = _pauses()
        while missing := sorted(set(names) - nodes_there(self.run_dir)):
            if stop.since is not None:
                return
            if time.monotonic() > deadline:
                raise RankFailed(
                    f"no word from {', '.join(missing)} in launch.join_s={self.join_s:g} s "
                    f"({len(names) - len(missing)} of {len(names)} nodes came); do they see "
                    f"run.dir={self.run_dir}? It must be on a file system that all nodes share"
                )
            time.sleep(next(pauses))

    def _publish(self, names: list[str]) -> socket.socket:
        """Listen on a free port of this node, and tell the other nodes which it is."""
        from distrain.launch.rendezvous import listen

        listener = listen(_own_address(names[1]))
        host, port = listener.getsockname()[:2]
        path = attempt_folder(self.run_dir) / _ENDPOINT_FILE
        atomic.write(path, f"{host}:{port}".encode(), sync=False)
        return listener

    def _look_up(self, first: str, stop: StopRequest) -> str:
        """Return where the first node listens."""
        path = attempt_folder(self.run_dir) / _ENDPOINT_FILE
        deadline = time.monotonic() + _IMPORT_S
        pauses = _pauses()
        while True:
            os.listdir(path.parent)  # has a network file system look again
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
        pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)


def node_python(*flags: str) -> list[str]:
    """Return the words that start python on a node.

    A signal that comes before the agent listens must not kill it: until then they are ignored.

    Args:
        flags: of python.
    """
    command = 'trap \'\' TERM USR1 USR2; exec "$0" "$@"'
    return ["sh", "-c", command, sys.executable, *flags]


def _own_address(peer: str) -> str:
    """Return the address of this node that it reaches another one from.

    What a node's own name resolves to may be a loopback address that means another node elsewhere.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # of a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
    except OSError as error:
        raise RankFailed(f"the nodes cannot reach one another by name: {peer}: {error}") from error


def _start_method() -> str:
    from distrain.launch.local import may_fork

    return "fork" if may_fork() else "spawn"


def main(path: str) -> None:
    """Run the task that a file holds, where no submitit does it: see `allocation`."""
    with open(path, "rb") as file:
        task: NodeTask = pickle.load(file)
    task()


if __name__ == "__main__":
    main(sys.argv[1])

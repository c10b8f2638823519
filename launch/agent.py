"""Agent of a node: starts the node's ranks, watches them, and restarts them.

torch's elastic agent with four changes. Ranks that survive a failed one are killed after 3 s, not
30 s: stuck in a collective they handle no SIGTERM. A rank whose process ends before all ranks are
done has failed, whatever its exit code. Ranks without progress have failed too. A signal to this
process does not end the ranks, but requests that they stop.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import (
    RunResult,
    Worker,
    WorkerGroup,
    WorkerSpec,
    WorkerState,
)
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from distrain.errors import ExitCode
from distrain.files.temp_folder import TemporaryFolder
from distrain.launch import Job, failure
from distrain.launch.failure import Failure
from distrain.launch.options import RankOptions
from distrain.launch.rank import log_path, loopback_env, rank_main
from distrain.launch.rendezvous import StaticRendezvous
from distrain.launch.stop import StopRequest
from distrain.launch.watchdog import Watchdog
from distrain.process import open_files
from distrain.process.environment import environment
from distrain.process.garbage import importing

SURVIVOR_S = 3.0
"""Seconds in which ranks that survive a failed one may notice it and log it."""

_RESEND_S = 1.0  # between stop signals: a rank that was just starting misses the first


def run_node(
    job: Job,
    *,
    ranks: int,
    log_dir: Path,
    stop: StopRequest,
    options: RankOptions,
    rendezvous: StaticRendezvous | None = None,
    on_failure: Callable[[Failure], None] | None = None,
) -> ExitCode:
    """Run a job on this node's ranks; return STOPPED if one of them did, else FINISHED.

    Args:
        job: run by every rank.
        ranks: on this node.
        log_dir: folder of the logs, `rank_N.log`.
        stop: request of this process; it is sent to the ranks as SIGUSR2.
        options: of the ranks; without a start method they are spawned.
        rendezvous: of the agents of all nodes; None: one node.
        on_failure: called with the cause of each failed attempt.

    Raises:
        ConfigError, NonFiniteLoss, RankFailed: as the failing rank's job.
    """
    _silence_torch()
    rendezvous = rendezvous or StaticRendezvous()
    world_size, method = ranks * rendezvous.num_nodes, options.start_method or "spawn"
    open_files.raise_limit()
    open_files.check_agent(ranks, world_size=world_size)
    threads = None if "OMP_NUM_THREADS" in os.environ else max(1, _num_cpus() // ranks)
    log_dir.mkdir(parents=True, exist_ok=True)
    if method == "fork" and world_size > 1:
        # DistributedDataParallel imports it when it is first made: 1.6 s, paid here once
        with importing():
            importlib.import_module("torch._dynamo")
    spec = WorkerSpec(
        role="distrain",
        local_world_size=ranks,
        entrypoint=rank_main,
        # log_dir as a Path: torch substitutes ${local_rank} and the like in a str
        args=(job, log_dir, os.getpid(), threads),
        rdzv_handler=rendezvous,
        max_restarts=options.max_restarts,
        monitor_interval=0.1,
    )
    watchdog = Watchdog(options.watchdog_s, log_dir=log_dir, rendezvous=rendezvous)
    files = _RankFiles(log_dir, nodes=rendezvous.num_nodes, watchdog=watchdog)
    with files, warnings.catch_warnings():
        # Python 3.12 on warns of fork with other threads, such as the store's: the child uses
        # nothing that they hold
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        agent = _Agent(spec, files, method, rendezvous, watchdog, stop)
        agent.grace_s, agent.log_dir, agent.on_failure = options.grace_s, log_dir, on_failure
        with environment({"TORCHELASTIC_SIGNALS_TO_HANDLE": ""}):  # torch installs no handlers
            result = agent.run()
    if result.is_failed():
        assert agent.cause is not None
        raise agent.cause.error()
    is_stopped = ExitCode.STOPPED in result.return_values.values()
    return ExitCode.STOPPED if is_stopped else ExitCode.FINISHED


class _RankFiles(LogsSpecs):
    """Environment of each rank: its failure file, its heartbeat file, and network variables.

    Failure files lie in a temporary folder until the end of the `with`: the run folder may be full
    or lost.
    """

    def __init__(self, log_dir: Path, *, nodes: int, watchdog: Watchdog) -> None:
        super().__init__()
        self._log_dir = log_dir
        self._watchdog = watchdog
        self._errors = TemporaryFolder("errors-")
        self._network = loopback_env(os.environ) if nodes == 1 else {}

    @property
    def root_log_dir(self) -> str:
        return str(self._log_dir)

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Return the destinations of a new attempt; add variables to `envs`, by local rank."""
        self._watchdog.add_files(envs.values())
        files = {}
        for local_rank, env in envs.items():
            files[local_rank] = f"{self._errors_dir}/rank_{env['RANK']}.json"
            Path(files[local_rank]).unlink(missing_ok=True)  # of the attempt before
            env["TORCHELASTIC_ERROR_FILE"] = files[local_rank]
            env.update(self._network)
        console = dict.fromkeys(envs, "")
        return LogsDest(stdouts=console, stderrs=dict(console), error_files=files)

    def __enter__(self) -> None:
        self._errors_dir = self._errors.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._errors.__exit__(*error)
        self._watchdog.close()


class _Agent(LocalElasticAgent):
    """torch's agent with the changes named in the module's docstring.

    Attributes:
        cause: of the last failed attempt.
        grace_s, log_dir, on_failure: see `run_node`.
    """

    grace_s: float
    log_dir: Path
    on_failure: Callable[[Failure], None] | None

    def __init__(
        self,
        spec: WorkerSpec,
        files: _RankFiles,
        start_method: str,
        peers: StaticRendezvous,
        watchdog: Watchdog,
        stop: StopRequest,
    ) -> None:
        super().__init__(spec, files, start_method)
        self.cause: Failure | None = None
        self._peers, self._watchdog, self._stop = peers, watchdog, stop
        self._last_sent_s = 0.0
        stop.kill = self._kill

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Return the state of the ranks; torch calls this ten times per second."""
        given_up = self._forward_stop()
        result: RunResult | None = None
        hang: Failure | None = None
        if not given_up and not self._has_ended() and not self._peers.peer_failed():
            result = super()._monitor_workers(worker_group)
            if result.state is WorkerState.HEALTHY:
                pids = {w.global_rank: p.pid for w, p in self._ranks(worker_group)}
                hang = self._watchdog.check(pids)
            if hang is None and not result.is_failed():
                return result
        self._peers.signal_failure()
        if given_up is None and hang is None:
            self._await_survivors()
        codes = {w.global_rank: p.exitcode for w, p in self._ranks(worker_group)}
        if result is not None and result.is_failed():  # torch was faster, and killed the others
            codes = {rank: codes[rank] for rank in result.failures}
        self._kill()
        failures = self._failures(worker_group, codes) + ([] if hang is None else [hang])
        failures += self._peers.exchange(failures)
        unknown = self._failure("another node failed without a record")
        self.cause = given_up or failure.cause(failures or [unknown])
        if self.on_failure is not None:
            self.on_failure(self.cause)
        self._decide_restart(worker_group.spec.max_restarts)
        return RunResult(WorkerState.FAILED, failures=self._for_torch(worker_group))

    def _shutdown(  # type: ignore[override]  # torch >= 2.12 has a timeout
        self, death_sig: signal.Signals = signal.SIGTERM, **timeout: int
    ) -> None:
        """Kill remaining ranks; torch calls this at the end in any case."""
        self._kill()
        super()._shutdown(signal.SIGKILL, **timeout)

    def _processes(self) -> list[Any]:
        """Return the processes of the ranks, in their order."""
        context: Any = self._pcontext
        return [] if context is None or context._pc is None else list(context._pc.processes)

    def _ranks(self, worker_group: WorkerGroup) -> list[tuple[Worker, Any]]:
        """Return each rank with its process."""
        return list(zip(worker_group.workers, self._processes(), strict=True))

    def _has_ended(self) -> bool:
        """Return whether a process has ended: they all wait for the last rank to be done."""
        return any(process.exitcode is not None for process in self._processes())

    def _forward_stop(self) -> Failure | None:
        """Forward a stop request to the ranks; return a failure if they have to be killed."""
        since = self._stop.poll()
        if since is None:
            return None
        now = time.monotonic()
        if self._stop.at_once:
            return self._failure("the ranks were killed by a second Ctrl-C, without saving")
        if now - since > self.grace_s:
            limit = f"launch.grace_s={self.grace_s:g} s"
            return self._failure(f"the ranks were killed: they had not stopped after {limit}")
        if now - self._last_sent_s > _RESEND_S:
            self._last_sent_s = now
            for process in self._processes():
                if process.exitcode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGUSR2)
        return None

    def _await_survivors(self) -> None:
        """Wait up to SURVIVOR_S for ranks to end after a failure, so that they can log it."""
        deadline = time.monotonic() + SURVIVOR_S
        while time.monotonic() < deadline:
            if all(process.exitcode is not None for process in self._processes()):
                return
            time.sleep(0.02)

    def _kill(self) -> None:
        """Kill the ranks and their children: each rank is the leader of a session."""
        for process in self._processes():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.exitcode is None:
                process.kill()  # it may not be a leader yet

    def _failures(self, worker_group: WorkerGroup, codes: dict[int, int | None]) -> list[Failure]:
        """Return the failures of ranks that ended by themselves; the others have no exit code."""
        assert self._pcontext is not None
        failures = []
        for worker, process in self._ranks(worker_group):
            process.join(SURVIVOR_S)
            rank, code = worker.global_rank, codes.get(worker.global_rank)
            found = failure.read(self._pcontext.error_files[worker.local_rank])
            if found is None and code is not None:
                found = failure.of_exit_code(code, rank=rank, log=log_path(self.log_dir, rank))
            if found is not None:
                failures.append(found)
        return failures

    def _failure(self, text: str) -> Failure:
        """Return a failure of all ranks."""
        return Failure(-1, "killed", text, log=str(self.log_dir), time_s=time.time())

    def _decide_restart(self, max_restarts: int) -> None:
        """Report that the ranks restart, or prevent it where it is useless or unwanted."""
        assert self.cause is not None
        if self.cause.is_final or self._stop.signals:
            self._remaining_restarts = 0
        if self._remaining_restarts:
            # a nice run that failed while it stepped aside: it is asked again after the restart
            self._stop.reset()
            self._stop.kill = self._kill
            number = max_restarts - self._remaining_restarts + 1
            line = f"{self.cause.line()}; starting again, {number} of {max_restarts}"
            print(line, file=sys.stderr, flush=True)

    def _for_torch(self, worker_group: WorkerGroup) -> dict[int, ProcessFailure]:
        """Return one failure as torch records it."""
        worker, process = self._ranks(worker_group)[0]
        code = process.exitcode if process.exitcode is not None else int(ExitCode.FAILED)
        return {worker.global_rank: ProcessFailure(worker.local_rank, process.pid, code, "")}


def _silence_torch() -> None:
    """Keep the log of torch's agent from the console: our own lines report the same."""
    logger = logging.getLogger("torch.distributed.elastic")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    logger.propagate = False


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0))

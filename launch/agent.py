"""The agent of a node: it starts the node's ranks, watches them, and starts them again.

torch's elastic agent with four things changed. The ranks that survive a failed one are ended at
once and not after 30 s: stuck in a collective they would not hear a SIGTERM. A rank whose process
ends before all ranks are done has failed, whatever its exit code says. Ranks that make no progress
have failed as well. And signals to this process do not end the ranks, but ask them to stop.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
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
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from distrain.errors import ExitCode
from distrain.launch import Job, failure
from distrain.launch.elastic import RankFiles, no_handlers_of_torch, silence_torch
from distrain.launch.failure import Failure
from distrain.launch.rank import RankTask, log_path, rank_main
from distrain.launch.rendezvous import Meeting
from distrain.launch.stop import StopRequest
from distrain.launch.watchdog import Watchdog
from distrain.process import open_files as openfiles

SURVIVOR_S = 3.0
"""How long ranks that survive a failed one get to notice it and to say so."""

_RESEND_S = 1.0  # a rank that was just starting may have missed the request to stop


def run_node(
    job: Job,
    *,
    ranks: int,
    log_dir: Path,
    stop: StopRequest,
    nodes: int = 1,
    node_rank: int = 0,
    endpoint: socket.socket | str | None = None,
    run_id: str = "distrain",
    max_restarts: int = 0,
    grace_s: float = 120.0,
    join_s: float = 600.0,
    start_method: str = "spawn",
    watchdog_s: float | None = None,
    on_failure: Callable[[Failure], None] | None = None,
) -> ExitCode:
    """Run a job on the ranks of this node, together with the agents of the other nodes.

    Args:
        job: run by every rank.
        ranks: on this node.
        log_dir: folder of the logs, `rank_N.log`.
        stop: tells whether someone asked to stop; the ranks are asked by SIGUSR2 then.
        nodes: how many there are.
        node_rank: of this node; ranks are numbered by it.
        endpoint: of node 0, where all agents meet: on node 0 the listening socket, see
            `meeting.listen`; on others "host:port". Not needed for one node.
        run_id: equal on all nodes, and another for another run.
        max_restarts: how often all ranks are started again after a failure.
        grace_s: from a request to stop until ranks that are still there are killed.
        join_s: how long the agents wait for one another.
        start_method: "fork" or "spawn"; fork is sound only in a process that has not used torch.
        watchdog_s: how long a rank may make no progress, see `Progress`; 0: for ever.
        on_failure: called with the cause of each failed attempt.

    Returns:
        STOPPED if a rank says so, else FINISHED.

    Raises:
        ConfigError, NonFiniteLoss, RankFailed: as the failing rank's job.
    """
    silence_torch()
    openfiles.raise_limit()
    openfiles.check_agent(ranks, world_size=ranks * nodes)
    meeting = Meeting(
        nodes=nodes, node_rank=node_rank, endpoint=endpoint, run_id=run_id, join_s=join_s
    )
    threads = None if "OMP_NUM_THREADS" in os.environ else max(1, _cpus() // ranks)
    task = RankTask(job, log_dir, os.getpid(), threads)
    log_dir.mkdir(parents=True, exist_ok=True)
    if start_method == "fork" and ranks * nodes > 1:
        # DistributedDataParallel imports it when it is first made: 1.6 s, paid here once
        importlib.import_module("torch._dynamo")
    watchdog = Watchdog(watchdog_s, log_dir=log_dir, meeting=meeting)
    files = RankFiles(log_dir, nodes=nodes, watchdog=watchdog)
    with files, warnings.catch_warnings():
        # Python 3.12 on warns of fork beside other threads, such as the store's: its child never
        # touches what they hold
        warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
        spec = WorkerSpec(
            role="distrain",
            local_world_size=ranks,
            entrypoint=rank_main,
            args=(task,),
            rdzv_handler=meeting,
            max_restarts=max_restarts,
            monitor_interval=0.1,
        )
        agent = _Agent(spec, files, start_method, meeting, task, stop)
        agent.watchdog = watchdog
        agent.grace_s = grace_s
        agent.on_failure = on_failure
        with no_handlers_of_torch():
            result = agent.run()
    if result.is_failed():
        assert agent.cause is not None
        raise agent.cause.error()
    codes = set(result.return_values.values())
    return ExitCode.STOPPED if ExitCode.STOPPED in codes else ExitCode.FINISHED


class _Agent(LocalElasticAgent):
    """torch's agent with the changes that this module's docstring tells."""

    watchdog: Watchdog

    def __init__(
        self,
        spec: WorkerSpec,
        logs_specs: LogsSpecs,
        start_method: str,
        meeting: Meeting,
        task: RankTask,
        stop: StopRequest,
    ) -> None:
        super().__init__(spec, logs_specs, start_method)
        self.cause: Failure | None = None
        self.grace_s = 0.0
        self.on_failure: Callable[[Failure], None] | None = None
        self._meeting = meeting
        self._task = task
        self._stop = stop
        self._last_sent = 0.0
        stop.kill = self._kill

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """Return the state of the ranks; torch calls this ten times a second."""
        given_up = self._pass_on_stop()
        result: RunResult | None = None
        hang: Failure | None = None
        if not given_up and not self._someone_gone() and not self._meeting.someone_failed():
            result = super()._monitor_workers(worker_group)
            if result.state is WorkerState.HEALTHY:
                hang = self.watchdog.look(
                    {w.global_rank: p.pid for w, p in self._ranks(worker_group)}
                )
            if hang is None and not result.is_failed():
                return result
        self._meeting.tell_failure()
        if given_up is None and hang is None:
            self._await_survivors()
        codes = {w.global_rank: p.exitcode for w, p in self._ranks(worker_group)}
        if result is not None and result.is_failed():  # torch was faster, and has ended the others
            codes = {rank: codes[rank] for rank in result.failures}
        self._kill()
        failures = self._failures(worker_group, codes) + ([] if hang is None else [hang])
        failures += self._meeting.exchange(failures)
        self.cause = given_up or failure.cause(
            failures or [self._failure("another node failed without a word")]
        )
        if self.on_failure is not None:
            self.on_failure(self.cause)
        self._decide_restart(worker_group.spec.max_restarts)
        return RunResult(WorkerState.FAILED, failures=self._for_torch(worker_group))

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        """End what is left of the ranks; torch calls this at the end in any case."""
        self._kill()
        super()._shutdown(signal.SIGKILL, timeout)

    def _processes(self) -> list[Any]:
        """Return the ranks' processes, in their order."""
        context: Any = self._pcontext
        return [] if context is None or context._pc is None else list(context._pc.processes)

    def _ranks(self, worker_group: WorkerGroup) -> list[tuple[Worker, Any]]:
        """Return each rank with its process."""
        return list(zip(worker_group.workers, self._processes(), strict=True))

    def _someone_gone(self) -> bool:
        """Say whether a process has ended: they all wait for the last rank to be done."""
        return any(process.exitcode is not None for process in self._processes())

    def _pass_on_stop(self) -> Failure | None:
        """Ask the ranks to stop if we were asked; return a failure if they were killed instead."""
        since = self._stop.since
        if since is None:
            return None
        now = time.monotonic()
        if self._stop.at_once:
            return self._failure("the ranks were killed by a second Ctrl-C, without saving")
        if now - since > self.grace_s:
            took = f"launch.grace_s={self.grace_s:g} s"
            return self._failure(f"the ranks were killed: they had not stopped after {took}")
        if now - self._last_sent > _RESEND_S:
            self._last_sent = now
            for process in self._processes():
                if process.exitcode is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGUSR2)
        return None

    def _await_survivors(self) -> None:
        """Give the ranks a moment to notice that one has failed, for the sake of their logs."""
        deadline = time.monotonic() + SURVIVOR_S
        while time.monotonic() < deadline:
            if all(process.exitcode is not None for process in self._processes()):
                return
            time.sleep(0.02)

    def _kill(self) -> None:
        """Kill the ranks and what they have started: each is the leader of a session."""
        for process in self._processes():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            if process.exitcode is None:
                process.kill()  # it may not be a leader yet

    def _failures(self, worker_group: WorkerGroup, codes: dict[int, int | None]) -> list[Failure]:
        """Return how the ranks failed that ended by themselves.

        Args:
            worker_group: the ranks of this node.
            codes: exit codes by rank, None for those that were still running.
        """
        assert self._pcontext is not None
        failures = []
        for worker, process in self._ranks(worker_group):
            process.join(SURVIVOR_S)
            rank, code = worker.global_rank, codes.get(worker.global_rank)
            found = failure.read(self._pcontext.error_files[worker.local_rank])
            if found is None and code is not None:
                log = log_path(self._task.log_dir, rank)
                found = failure.of_exit_code(code, rank=rank, log=log)
            if found is not None:
                failures.append(found)
        return failures

    def _failure(self, text: str) -> Failure:
        """Return a failure of all ranks."""
        return Failure(-1, "killed", text, log=str(self._task.log_dir), time_s=time.time())

    def _decide_restart(self, max_restarts: int) -> None:
        """Say that the ranks start again, or see to it that they do not."""
        assert self.cause is not None
        if self.cause.is_final or self._stop.since is not None:
            self._remaining_restarts = 0
        if self._remaining_restarts:
            number = max_restarts - self._remaining_restarts + 1
            line = f"{self.cause.line()}; starting again, {number} of {max_restarts}"
            print(line, file=sys.stderr, flush=True)

    def _for_torch(self, worker_group: WorkerGroup) -> dict[int, ProcessFailure]:
        """Return one failure in torch's form, for its own book-keeping."""
        worker, process = self._ranks(worker_group)[0]
        code = process.exitcode if process.exitcode is not None else int(ExitCode.FAILED)
        return {worker.global_rank: ProcessFailure(worker.local_rank, process.pid, code, "")}


def _cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0))

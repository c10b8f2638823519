"""Start and end of an attempt, run by the batch script of a SLURM job on its first node.

::

    python -m distrain.launch.slurm.batch begin RUN
    srun ... one agent per node, which writes RUN/slurm/JOB-RESTART/NODE.json ...
    python -m distrain.launch.slurm.batch end RUN --step-exit $?

`end` adds a line to RUN/attempts.jsonl. It requeues the job if a signal stopped the attempt with
its state saved, or a node was lost; SLURM itself does that after a preemption or the loss of the
first node. A cancelled job, and one whose run stopped itself, is never requeued. An attempt without
`end` gets its line from the next `begin`. Standard library only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from distrain.errors import ExitCode
from distrain.launch.slurm import queue
from distrain.launch.slurm.attempts import (
    clear_stop_request,
    is_stop_requested,
    judge,
    read_nodes,
    without_progress,
)
from distrain.log import report
from distrain.process import stdio
from distrain.run_layout import CHECKPOINTS, LOGS, METRICS_FILE
from distrain.runfolder import attempts as journal
from distrain.runfolder.attempts import JOB_FOLDER, SUBMITTED_FILE, Attempt


def begin(run_dir: Path, *, max_requeues: int) -> ExitCode:
    """Record that an attempt starts, and the end of one that was cut off.

    Returns:
        FINISHED to go on; BAD_CONFIG if this node does not see the run folder; FAILED after more
        than `max_requeues` attempts in a row without progress; STOPPED if a stop was requested.
    """
    if not (run_dir / JOB_FOLDER / SUBMITTED_FILE).exists():
        node = os.environ.get("SLURMD_NODENAME", "this node")
        report(
            f"run.dir={run_dir}: {node} does not see the files written at submission; "
            "the run folder must be on a file system that all nodes share"
        )
        return ExitCode.BAD_CONFIG
    cut_off = _running(run_dir)
    if cut_off is not None:
        why = "its first node was lost or killed"
        journal.close(run_dir, cut_off, outcome="lost", why=why, end=_last_write_s(run_dir))
    attempts = journal.read_attempts(run_dir)
    job_id = queue.own_job_id()
    assert job_id is not None
    if is_stop_requested(run_dir, job_id):
        clear_stop_request(run_dir)
        report(f"job {job_id} was asked to stop before this attempt")
        return ExitCode.STOPPED
    nodes = queue.hostnames(os.environ.get("SLURM_JOB_NODELIST", ""))
    attempt = journal.new_attempt(run_dir, job_id, restart=queue.own_restarts(), nodes=nodes)
    num_stuck = without_progress(attempts, job_id)
    if num_stuck > max_requeues:
        why = _gave_up(num_stuck)
        journal.close(run_dir, attempt, outcome="failed", why=why)
        report(why)
        return ExitCode.FAILED
    journal.begin(run_dir, attempt)
    return ExitCode.FINISHED


def end(run_dir: Path, *, step_exit: int, max_requeues: int) -> ExitCode:
    """Record how an attempt ended; requeue the job where that helps; return the exit code."""
    attempt = _running(run_dir)
    if attempt is None:
        report(f"{run_dir}: `end` without `begin`")
        return ExitCode.FAILED
    try:
        status = queue.status(attempt.job_id)
    except queue.QueueError as error:  # a requeue would fail too
        report(str(error))
        status = None
    nodes = read_nodes(run_dir)
    code, outcome, why = judge(nodes, attempt.nodes, step_exit, status)
    # a stop without a signal is the run's own: by trainer.max_time, or by StopAt for a sweep
    is_cut_short = outcome == "lost" or any(node.signals for node in nodes.values())
    requeued = outcome in ("stopped", "lost") and is_cut_short and _may_requeue(status)
    if is_stop_requested(run_dir, attempt.job_id):
        clear_stop_request(run_dir)
        requeued = False
    if requeued:
        # this attempt counts too, unless the newest checkpoint is its own
        num_stuck = without_progress(journal.read_attempts(run_dir), attempt.job_id) + 1
        if journal.kept(run_dir) <= attempt.first_iter and num_stuck > max_requeues:
            requeued, code, outcome = False, ExitCode.FAILED, "failed"
            why = f"{_gave_up(num_stuck)} (the last: {why})"
    stop_s = max((node.stop_s for node in nodes.values()), default=0.0)
    journal.close(run_dir, attempt, outcome=outcome, why=why, stop_s=stop_s, requeued=requeued)
    line = why.splitlines()[0] if why else ""
    report(f"attempt {attempt.attempt} {outcome}: {line}" + ("; requeued" if requeued else ""))
    if requeued:
        try:
            queue.requeue(attempt.job_id)  # kills this script soon after
        except queue.QueueError as error:
            report(f"job {attempt.job_id} could not be requeued: {error}")
    return code


def _running(run_dir: Path) -> Attempt | None:
    try:
        return journal.read_running(run_dir)
    except (TypeError, ValueError):  # damaged by a power cut, which must not stop the run
        return None


def _gave_up(num_stuck: int) -> str:
    return (
        f"{num_stuck} attempts in a row without a newer checkpoint: not requeued again; see the "
        "logs, save more often, or allow more with launch.max_requeues"
    )


def _may_requeue(status: queue.Status | None) -> bool:
    """Return whether neither a user nor SLURM has ended the job: a cancelled job stays cancelled.

    While the processes of a job end, its state is COMPLETING for any cause; only the reason
    distinguishes a time limit from a `scancel`.
    """
    return status is not None and (status.state == "RUNNING" or status.reason == "TimeLimit")


def _last_write_s(run_dir: Path) -> float:
    """Return when a run that was cut off last wrote a file."""
    files = [run_dir / METRICS_FILE, *(run_dir / LOGS).glob("*"), run_dir / CHECKPOINTS]
    return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `begin` or `end`."""
    stdio.protect()  # a full disk under the job's output must not prevent the requeue
    parser = argparse.ArgumentParser(prog="distrain.launch.slurm.batch")
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--max-requeues", type=int, default=3)
    parser.add_argument("--step-exit", type=int, default=0, help="exit code of srun")
    args = parser.parse_args(argv)
    if args.moment == "begin":
        return begin(args.run_dir, max_requeues=args.max_requeues)
    return end(args.run_dir, step_exit=args.step_exit, max_requeues=args.max_requeues)


if __name__ == "__main__":
    sys.exit(main())

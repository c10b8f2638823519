"""The batch script's part on SLURM: what is done before and after the step, on the first node.

The batch script of a job runs this around its step::

    python -m distrain.launch.slurm.batch begin RUN
    srun ... one agent a node, which writes RUN/slurm/JOB-RESTART/NODE.json ...
    python -m distrain.launch.slurm.batch end RUN --step-exit $?

`end` adds one line to RUN/attempts.jsonl. Where the attempt was stopped with its state saved, or a
node was lost, it also sends the job back into the queue; SLURM itself does that after a preemption
or when the script's own node is lost. It never does for a job that was cancelled. What was cut off
without its `end` gets its line from the next `begin`. Standard library only: no torch on the way.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from distrain.checkpoint.catalog import find_all
from distrain.checkpoint.format import iteration_of
from distrain.errors import ExitCode
from distrain.launch.slurm import queue as slurm_queue
from distrain.launch.slurm.attempts import (
    RUNNING_FILE,
    SLURM_FOLDER,
    SUBMITTED_FILE,
    Attempt,
    forget_to_stop,
    is_asked_to_stop,
    judge,
    read_attempts,
    read_json,
    read_nodes,
    without_progress,
    write_json,
)
from distrain.process import stdio
from distrain.run_layout import ATTEMPTS_FILE, CHECKPOINTS, LOGS, METRICS_FILE
from distrain.scalar_names import STEP_S


def begin(run_dir: Path, *, max_requeues: int) -> ExitCode:
    """Note that an attempt starts; finish the line of one that was cut off.

    Returns:
        FINISHED to go on; BAD_CONFIG if this node does not see the run folder; FAILED if the job
        was requeued `max_requeues` times in a row without progress; STOPPED if it was asked to.
    """
    if not (run_dir / SLURM_FOLDER / SUBMITTED_FILE).exists():
        node = os.environ.get("SLURMD_NODENAME", "this node")
        _say(
            f"run.dir={run_dir}: {node} does not see what the submitting machine wrote there; "
            "the run folder must be on a file system that all nodes share"
        )
        return ExitCode.BAD_CONFIG
    running = run_dir / SLURM_FOLDER / RUNNING_FILE
    cut_off = read_json(running)
    if cut_off:
        lost = dataclasses.replace(Attempt(**cut_off), end=_last_sign(run_dir), outcome="lost")
        _close(run_dir, dataclasses.replace(lost, why="its first node was lost or killed"))
    attempts = read_attempts(run_dir)
    job_id = slurm_queue.own_job_id()
    assert job_id is not None
    if is_asked_to_stop(run_dir, job_id):
        forget_to_stop(run_dir)
        _say(f"job {job_id} was asked to stop before this attempt")
        return ExitCode.STOPPED
    attempt = Attempt(
        attempt=len(attempts) + 1,
        job_id=job_id,
        restart=slurm_queue.own_restarts(),
        nodes=slurm_queue.hostnames(os.environ.get("SLURM_JOB_NODELIST", "")),
        start=time.time(),
        first_iter=_kept_iter(run_dir),
    )
    barren = without_progress(attempts, job_id)
    if barren > max_requeues:
        why = _gave_up(barren)
        _close(run_dir, dataclasses.replace(attempt, end=time.time(), outcome="failed", why=why))
        _say(why)
        return ExitCode.FAILED
    write_json(running, dataclasses.asdict(attempt))
    return ExitCode.FINISHED


def end(run_dir: Path, *, step_exit: int, max_requeues: int) -> ExitCode:
    """Note how an attempt ended; send the job back into the queue where that helps.

    Args:
        run_dir: the run folder.
        step_exit: what `srun` returned.
        max_requeues: how many attempts in a row without progress are followed by another.

    Returns:
        What the batch script returns.
    """
    running = read_json(run_dir / SLURM_FOLDER / RUNNING_FILE)
    if not running:
        _say(f"{run_dir}: `end` without `begin`")
        return ExitCode.FAILED
    attempt = Attempt(**running)
    try:
        status = slurm_queue.status(attempt.job_id)
    except slurm_queue.QueueError as error:  # then nobody can requeue either
        _say(str(error))
        status = None
    nodes = read_nodes(run_dir)
    code, outcome, why = judge(nodes, attempt.nodes, step_exit, status)
    again = outcome in ("stopped", "lost") and _may_requeue(status)
    if is_asked_to_stop(run_dir, attempt.job_id):
        forget_to_stop(run_dir)
        again = False
    if again:
        # this attempt counts too; the newest checkpoint tells whether it got anywhere
        barren = without_progress(read_attempts(run_dir), attempt.job_id) + 1
        if _kept_iter(run_dir) <= attempt.first_iter and barren > max_requeues:
            again, code, outcome = False, ExitCode.FAILED, "failed"
            why = f"{_gave_up(barren)} (the last: {why})"
    attempt = dataclasses.replace(
        attempt,
        end=time.time(),
        outcome=outcome,
        why=why,
        stop_s=max((node.stop_s for node in nodes.values()), default=0.0),
        requeued=again,
    )
    _close(run_dir, attempt)
    line = why.splitlines()[0] if why else ""
    _say(f"attempt {attempt.attempt} {outcome}: {line}" + ("; requeued" if again else ""))
    if again:
        try:
            slurm_queue.requeue(attempt.job_id)  # this script is killed soon after
        except slurm_queue.QueueError as error:
            _say(f"job {attempt.job_id} could not be requeued: {error}")
    return code


def _gave_up(barren: int) -> str:
    return (
        f"{barren} attempts in a row without a newer checkpoint: not requeued again; see the logs, "
        "save more often, or allow more with launch.max_requeues"
    )


def _may_requeue(status: slurm_queue.Status | None) -> bool:
    """Say whether nobody has decided about the job yet: a cancelled one must stay so.

    SLURM would requeue that too: while a job's processes end, its state is COMPLETING whatever the
    cause, and the reason is what tells a time limit from a `scancel`.
    """
    if status is None:
        return False
    return status.state == "RUNNING" or status.reason == "TimeLimit"


def _close(run_dir: Path, attempt: Attempt) -> None:
    """Write the line of an attempt that is over, with what it got done."""
    kept_iter = _kept_iter(run_dir)
    last_iter, step_s = _progress(run_dir, attempt.first_iter)
    closed = dataclasses.replace(
        attempt,
        end=max(attempt.start, attempt.end),
        last_iter=max(last_iter, kept_iter, attempt.first_iter),
        kept_iter=kept_iter,
        step_s=step_s,
    )
    with (run_dir / ATTEMPTS_FILE).open("a") as file:
        file.write(json.dumps(dataclasses.asdict(closed)) + "\n")
        file.flush()
        os.fsync(file.fileno())
    (run_dir / SLURM_FOLDER / RUNNING_FILE).unlink(missing_ok=True)


def _kept_iter(run_dir: Path) -> int:
    """Return how many iterations the newest checkpoint holds, by its name; 0 without one."""
    found = find_all(run_dir / CHECKPOINTS)
    return iteration_of(found[-1].name) or 0 if found else 0


def _progress(run_dir: Path, first_iter: int) -> tuple[int, float]:
    """Return how many iterations metrics.jsonl knows of, and their mean time from first_iter on."""
    last, times = 0, []
    try:
        with (run_dir / METRICS_FILE).open("rb") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # the torn last line of a run that was killed
                last = max(last, row["iteration"] + 1)
                if row["iteration"] >= first_iter and STEP_S in row:
                    times.append(float(row[STEP_S]))
    except FileNotFoundError:
        return 0, 0.0
    return last, sum(times) / len(times) if times else 0.0


def _last_sign(run_dir: Path) -> float:
    """Return when a run that was cut off last wrote something."""
    files = [run_dir / METRICS_FILE, *(run_dir / LOGS).glob("*"), run_dir / CHECKPOINTS]
    return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)


def _say(line: str) -> None:
    print(f"distrain: {line}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `begin` or `end`, as a batch script does."""
    stdio.protect()  # a full disk under the job's output must not prevent the requeue
    parser = argparse.ArgumentParser(prog="distrain.launch.slurm.batch")
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--max-requeues", type=int, default=3)
    parser.add_argument("--step-exit", type=int, default=0, help="what srun returned")
    args = parser.parse_args(argv)
    if args.moment == "begin":
        return begin(args.run_dir, max_requeues=args.max_requeues)
    return end(args.run_dir, step_exit=args.step_exit, max_requeues=args.max_requeues)


if __name__ == "__main__":
    sys.exit(main())

"""What an attempt was, from what its nodes left behind; no SLURM is needed here."""

import json
from pathlib import Path

import pytest

from distrain.errors import ConfigError, ExitCode
from distrain.launch.failure import Failure
from distrain.launch.slurm import batch as slurm_batch
from distrain.launch.slurm import queue as slurm_queue
from distrain.launch.slurm.attempts import (
    NodeRecord,
    judge,
    prepare,
    without_progress,
)
from distrain.launch.slurm.queue import Status
from distrain.runfolder.attempts import Attempt, read_attempts, summary

RUNNING = Status("7", "RUNNING", "None", "n[1-2]", 0, 0, 0)
CANCELLED = Status("7", "COMPLETING", "None", "n[1-2]", 0, 0, 0)
TIMED_OUT = Status("7", "COMPLETING", "TimeLimit", "n[1-2]", 0, 0, 0)


def node(name: str, code: int | None, **more: object) -> NodeRecord:
    return NodeRecord(name, code, **more)  # type: ignore[arg-type]


def failed(name: str, rank: int, text: str, *, time_s: float, of_peer: bool) -> NodeRecord:
    cause = Failure(rank, "error", text, time_s=time_s, of_peer=of_peer)
    return NodeRecord(name, 1, error=cause.line(), failure=vars(cause))


def test_a_line_of_scontrol_is_read() -> None:
    line = (
        "JobId=19 ArrayJobId=17 ArrayTaskId=1 JobName=wrap UserId=root(0) JobState=RUNNING "
        "Reason=None Dependency=(null) Requeue=1 Restarts=2 ExitCode=1:9 NodeList=n[1-2] Power="
    )
    assert slurm_queue.parse(line) == Status("17_1", "RUNNING", "None", "n[1-2]", 2, 1, 9)
    pending = "JobId=17 ArrayJobId=17 ArrayTaskId=2-3%2 JobState=PENDING NodeList=(null)"
    assert slurm_queue.parse(pending) == Status("17", "PENDING", "None", "", 0, 0, 0)


@pytest.mark.parametrize(
    ("nodes", "status", "expected"),
    [
        ([node("n1", 0), node("n2", 0)], RUNNING, (0, "finished", "all iterations are done")),
        (
            [node("n1", 75, signals=["SIGTERM"]), node("n2", 75, signals=["SIGUSR2"])],
            RUNNING,
            (75, "stopped", "SIGTERM on n1, SIGUSR2 on n2"),
        ),
        (
            [node("n1", 75), node("n2", 75)],
            CANCELLED,
            (75, "stopped", "trainer.max_time, a hook, or a signal to one rank"),
        ),
        (
            [node("n1", 1, error="x"), node("n2", 0)],
            RUNNING,
            (1, "failed", "x"),
        ),
        (
            [
                failed("n1", 0, "connection closed", time_s=1.0, of_peer=True),
                failed("n2", 3, "ValueError: wrong", time_s=2.0, of_peer=False),
            ],
            RUNNING,
            (1, "failed", "rank 3 failed: ValueError: wrong (log: )"),
        ),
        (  # who lost a peer did not fail by itself
            [failed("n1", 0, "connection closed", time_s=1.0, of_peer=True)],
            RUNNING,
            (1, "lost", "no record from n2 (srun returned 137)"),
        ),
        (
            [
                failed("n1", 0, "connection closed", time_s=1.0, of_peer=True),
                failed("n2", 2, "connection closed", time_s=0.5, of_peer=True),
            ],
            RUNNING,
            (1, "failed", "rank 2 failed: connection closed (log: )"),
        ),
        ([node("n1", 2, error="lr=x: no")], RUNNING, (2, "failed", "lr=x: no")),
        ([node("n1", 0)], RUNNING, (1, "lost", "no record from n2 (srun returned 137)")),
        (
            [node("n1", None), node("n2", None)],
            RUNNING,
            (1, "lost", "no record from n1, n2 (srun returned 137)"),
        ),
        (
            [node("n1", None), node("n2", None)],
            TIMED_OUT,
            (1, "lost", "the time limit came before the state was saved"),
        ),
        (
            [node("n1", None), node("n2", None)],
            CANCELLED,
            (1, "lost", "cancelled, preempted or requeued before the state was saved"),
        ),
    ],
)
def test_how_an_attempt_ended(
    nodes: list[NodeRecord], status: Status, expected: tuple[int, str, str]
) -> None:
    records = {record.node: record for record in nodes}
    assert judge(records, ["n1", "n2"], 137, status) == expected


def attempt(number: int, first: int, last: int, kept: int, **more: object) -> Attempt:
    start = 1000.0 + 100 * number
    times = {"start": start, "end": start + 50.0}
    fields = {"attempt": number, "job_id": "7", "restart": number - 1, "nodes": ["n1", "n2"]}
    steps = {"first_iter": first, "last_iter": last, "kept_iter": kept}
    return Attempt(**{**fields, **times, **steps, **more})  # type: ignore[arg-type]


def test_attempts_in_a_row_without_a_newer_checkpoint_are_counted() -> None:
    rows = [attempt(1, 0, 5, 0), attempt(2, 0, 20, 20), attempt(3, 20, 30, 20)]
    assert without_progress(rows, "7") == 1
    assert without_progress([*rows, attempt(4, 20, 20, 20)], "7") == 2
    assert without_progress(rows, "8") == 0  # another job starts anew
    assert without_progress([], "7") == 0


def test_the_table_tells_lost_iterations_and_goodput() -> None:
    # 1.5 s an iteration; 20 + 10 kept ones are 45 s of the 150 s from 1100 to 1250; 5 were lost
    rows = [
        attempt(1, 0, 25, 20, outcome="stopped", why="SIGTERM on n1", step_s=1.5),
        attempt(2, 20, 30, 30, outcome="finished", why="done", step_s=1.5),
    ]
    lines = summary(rows).splitlines()
    assert lines[1].split()[:7] == ["1", "7", "n1,n2", "0-25", "20", "50", "s"]
    assert lines[-1] == "5 iterations lost, goodput 30%"
    assert summary([]).splitlines()[-1] == "0 iterations lost"


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setattr(slurm_queue, "hostnames", lambda nodes: ["n1", "n2"])
    monkeypatch.setattr(slurm_queue, "status", lambda job_id: RUNNING)
    prepare(tmp_path, job_id="7")
    return tmp_path


def save(run_dir: Path, iteration: int) -> None:
    (run_dir / "checkpoints" / f"iter_{iteration:010d}").mkdir(parents=True)


def test_a_stopped_attempt_is_requeued_once_and_the_next_one_counts_on(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requeued: list[str] = []
    monkeypatch.setattr(slurm_queue, "requeue", requeued.append)
    assert slurm_batch.begin(run_dir, max_requeues=3) == ExitCode.FINISHED
    for name in ("n1", "n2"):
        NodeRecord(name, 75, ["SIGTERM"], stop_s=2.0).write(run_dir)
    save(run_dir, 30)
    rows = ['{"iteration": 9, "perf/step_s": 0.5}', '{"iteration": 39, "perf/step_s": 1.5}']
    (run_dir / "metrics.jsonl").write_text("\n".join([*rows, '{"itera']))
    assert slurm_batch.end(run_dir, step_exit=0, max_requeues=3) == ExitCode.STOPPED
    assert requeued == ["7"]
    (first,) = read_attempts(run_dir)
    assert (first.attempt, first.first_iter, first.last_iter, first.kept_iter) == (1, 0, 40, 30)
    assert (first.outcome, first.stop_s, first.step_s, first.useful_s) == ("stopped", 2.0, 1.0, 30)
    assert first.requeued

    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert slurm_batch.begin(run_dir, max_requeues=3) == ExitCode.FINISHED
    for name in ("n1", "n2"):
        NodeRecord(name, 0).write(run_dir)
    save(run_dir, 60)
    assert slurm_batch.end(run_dir, step_exit=0, max_requeues=3) == ExitCode.FINISHED
    second = read_attempts(run_dir)[1]
    assert (second.attempt, second.restart, second.first_iter, second.kept_iter) == (2, 1, 30, 60)
    assert requeued == ["7"]


@pytest.mark.parametrize(
    ("status", "signals", "again"),
    [
        (CANCELLED, ["SIGTERM"], False),
        (TIMED_OUT, ["SIGTERM"], True),
        (None, ["SIGTERM"], False),
        (RUNNING, ["SIGUSR2"], True),
        (RUNNING, [], False),  # the run's own stop: trainer.max_time, StopAt
    ],
)
def test_a_cancelled_job_and_a_run_that_stops_itself_are_not_requeued(
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: Status | None,
    signals: list[str],
    again: bool,
) -> None:
    requeued: list[str] = []
    monkeypatch.setattr(slurm_queue, "requeue", requeued.append)
    monkeypatch.setattr(slurm_queue, "status", lambda job_id: status)
    slurm_batch.begin(run_dir, max_requeues=3)
    for name in ("n1", "n2"):
        NodeRecord(name, 75, signals).write(run_dir)
    assert slurm_batch.end(run_dir, step_exit=0, max_requeues=3) == ExitCode.STOPPED
    assert requeued == (["7"] if again else [])


def test_a_crash_loop_ends(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requeued: list[str] = []
    monkeypatch.setattr(slurm_queue, "requeue", requeued.append)
    for restart in range(2):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        assert slurm_batch.begin(run_dir, max_requeues=2) == ExitCode.FINISHED
        assert slurm_batch.end(run_dir, step_exit=137, max_requeues=2) == ExitCode.FAILED
    assert len(requeued) == 2
    assert slurm_batch.begin(run_dir, max_requeues=2) == ExitCode.FINISHED
    assert slurm_batch.end(run_dir, step_exit=137, max_requeues=2) == ExitCode.FAILED
    assert len(requeued) == 2
    last = read_attempts(run_dir)[-1]
    assert last.outcome == "failed"
    assert "3 attempts in a row without a newer checkpoint" in last.why
    # SLURM requeues after a lost node without asking us: then the next start refuses
    assert slurm_batch.begin(run_dir, max_requeues=2) == ExitCode.FAILED


def test_what_was_cut_off_gets_its_line_from_the_next_attempt(run_dir: Path) -> None:
    slurm_batch.begin(run_dir, max_requeues=3)
    save(run_dir, 10)
    (run_dir / "metrics.jsonl").write_text('{"iteration": 14}\n')
    slurm_batch.begin(run_dir, max_requeues=3)
    (lost,) = read_attempts(run_dir)
    assert (lost.outcome, lost.kept_iter, lost.last_iter) == ("lost", 10, 15)
    running = json.loads((run_dir / "slurm" / "running.json").read_text())
    assert (running["attempt"], running["first_iter"]) == (2, 10)


@pytest.mark.parametrize("text", ["", "[]", '{"attempt": "x"}'])
def test_a_damaged_record_of_the_last_attempt_does_not_stop_the_next(
    run_dir: Path, text: str
) -> None:
    (run_dir / "slurm" / "running.json").write_text(text)
    assert slurm_batch.begin(run_dir, max_requeues=3) == ExitCode.FINISHED
    assert read_attempts(run_dir) == []


def test_a_node_without_the_run_folder_says_so(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = run_dir / "elsewhere"
    assert slurm_batch.begin(elsewhere, max_requeues=3) == ExitCode.BAD_CONFIG
    assert "n1 does not see" in capsys.readouterr().err


def test_a_run_belongs_to_one_job_at_a_time(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (run_dir / "slurm").stat().st_mode & 0o777 == 0o700
    prepare(run_dir, job_id="7")
    with pytest.raises(ConfigError, match=r"job 7 \(RUNNING\) works on this run"):
        prepare(run_dir)
    monkeypatch.setattr(slurm_queue, "status", lambda job_id: None)
    prepare(run_dir)

"""The digits trained on SLURM: whatever interrupts them, the weights are those of a local run.

All runs are started at the beginning and interrupted one after the other; then each test looks at
one of them.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from dev_cluster import SCRIPT, Cluster, is_alive, wait_for

from distrain.runfolder.attempts import Attempt, read_attempts

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(500)]

ROOT = SCRIPT.parents[1]
ITERATIONS = 60
DIGITS = (
    *("+experiment=digits", f"trainer.max_iter={ITERATIONS}", "trainer.window=2"),
    *("hooks.checkpoint.period=10", "hooks.eval.period=20", "+hooks.slow._target_=slow_hook.Slow"),
)
ON_SLURM = (*DIGITS, "launch=slurm", "launch.nodes=2", "launch.ranks=2", "launch.follow=true")


@dataclass
class Run:
    """A command that follows its run on SLURM, and what it prints."""

    folder: Path
    process: subprocess.Popen[str]
    out: Path

    @property
    def job_id(self) -> str:
        return wait_for(
            lambda: (
                json.loads((self.folder / "slurm/submitted.json").read_text())["job_id"]
                if (self.folder / "slurm/submitted.json").exists()
                else None
            ),
            timeout_s=60,
            what=self.out.read_text,
        )

    def reaches(self, iteration: int) -> None:
        wait_for(
            lambda: self.iteration() >= iteration or self.process.poll() is not None,
            timeout_s=120,
            what=lambda: f"iteration {iteration}; {self.out.read_text()}",
        )
        assert self.process.poll() is None, self.out.read_text()

    def iteration(self) -> int:
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
            return int(json.loads(lines[-1])["iteration"])
        except (FileNotFoundError, IndexError, ValueError):
            return -1

    def finished(self, *, timeout_s: float = 200.0) -> list[Attempt]:
        """Wait for its end, which must be a good one; return the attempts."""
        code = self.process.wait(timeout_s)
        assert code == 0, self.out.read_text()
        return read_attempts(self.folder)


@dataclass
class Runs:
    """Starts runs below one folder."""

    cluster: Cluster
    folder: Path
    reference: Path

    def start(self, name: str, *args: str, nodes: str, slow_s: float = 0.3) -> Run:
        out = self.folder / f"{name}.out"
        run = self.folder / name
        command = (sys.executable, "-m", "distrain", *ON_SLURM, f"run.dir={run}", *args)
        with out.open("w") as file:
            process = subprocess.Popen(
                [*command, f"+launch.sbatch.nodelist='{nodes}'"],
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=self.folder,
                env={**os.environ, "SLOW_S": str(slow_s)},
            )
        return Run(run, process, out)

    def differs(self, run: Run) -> str:
        """Return the table of digests that differ from the local run's, "" if all are equal."""
        done = subprocess.run(
            [sys.executable, "-m", "distrain.checkpoint", self.reference, run.folder],
            capture_output=True,
            text=True,
        )
        return "" if done.returncode == 0 else done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(
    session_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Runs, dict[str, Run]]]:
    folder = tmp_path_factory.mktemp("digits")
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(Path(__file__).parent)]))
    patch.setenv("OMP_NUM_THREADS", "1")
    all_runs = Runs(session_cluster, folder, folder / "local")
    n12, n34 = "n[1-2]", "n[3-4]"
    gpus = "launch.gpus_per_node=2"
    one_node = ("launch.nodes=1", "launch.ranks=4")  # half as much to start
    started = {
        "preempted": all_runs.start("preempted", gpus, nodes=n34),
        "requeued": all_runs.start("requeued", *one_node, nodes="n1"),
        "plain": all_runs.start("plain", nodes=n12, slow_s=0.0),
        "signalled": all_runs.start("signalled", nodes=n34),
        # of a minute: the signal comes 10 to 40 s after the start, so it must last longer than that
        "limited": all_runs.start(
            "limited", "launch.time_min=1", "launch.signal_s=20", *one_node, nodes="n2", slow_s=0.7
        ),
    }
    local = [f"run.dir={all_runs.reference}", "launch.ranks=4"]
    reference = subprocess.Popen([sys.executable, "-m", "distrain", *DIGITS, *local], cwd=folder)
    try:
        _interrupt(session_cluster, started)
        assert reference.wait(100) == 0
        yield all_runs, started
    finally:
        for process in (reference, *(run.process for run in started.values())):
            process.kill()
            process.wait()
        patch.undo()


def _interrupt(cluster: Cluster, started: dict[str, Run]) -> None:
    started["signalled"].reaches(13)
    os.kill(cluster.rank(started["signalled"].job_id, 3), signal.SIGUSR2)
    started["requeued"].reaches(13)
    cluster.run("scontrol", "requeue", started["requeued"].job_id)
    started["preempted"].reaches(13)
    cluster.run(
        "sbatch", "--partition=high", "--nodelist=n[3-4]", "--nodes=2", "--gpus-per-node=2",
        "--output=/dev/null", "--wrap=sleep 1",
    )  # fmt: skip


def test_not_interrupted(runs: tuple[Runs, dict[str, Run]]) -> None:
    all_runs, started = runs
    (attempt,) = started["plain"].finished()
    assert not all_runs.differs(started["plain"])
    assert attempt.nodes == ["n1", "n2"]
    assert 0 < attempt.step_s < 10


def test_a_signal_to_one_rank(runs: tuple[Runs, dict[str, Run]]) -> None:
    all_runs, started = runs
    assert started["signalled"].process.wait(200) == 75
    again = all_runs.start("signalled", nodes="n[3-4]")
    first, second = again.finished()
    assert not all_runs.differs(again)
    assert (first.outcome, first.requeued) == ("stopped", False)  # not SLURM's signal
    assert 13 <= first.kept_iter == second.first_iter < ITERATIONS


def test_requeued_by_an_operator(runs: tuple[Runs, dict[str, Run]]) -> None:
    all_runs, started = runs
    first, second = started["requeued"].finished()
    assert not all_runs.differs(started["requeued"])
    # SLURM kills what has not saved within KillWait; then the periodic checkpoint has to do
    assert first.outcome in ("stopped", "lost")
    assert 10 <= first.kept_iter < ITERATIONS
    assert not first.requeued  # the operator did
    assert (second.first_iter, second.last_iter) == (first.kept_iter, ITERATIONS)
    assert second.outcome == "finished"


def test_preempted_by_a_job_of_a_higher_partition(runs: tuple[Runs, dict[str, Run]]) -> None:
    all_runs, started = runs
    first, second = started["preempted"].finished()
    assert not all_runs.differs(started["preempted"])
    assert (first.outcome, first.requeued) == ("stopped", True)
    assert "SIGTERM" in first.why
    assert first.last_iter == first.kept_iter == second.first_iter
    text = started["preempted"].out.read_text()
    assert "0 iterations lost, goodput" in text


def test_a_node_is_lost(runs: tuple[Runs, dict[str, Run]]) -> None:
    all_runs, started = runs
    cluster = all_runs.cluster  # without the clean-up after a test: other runs are still there
    for name in ("preempted", "signalled"):
        started[name].process.wait(200)  # they use that node too
    run = all_runs.start("lost", nodes="n[3-4]")
    try:
        run.reaches(13)
        ranks = [cluster.rank(run.job_id, rank) for rank in (0, 1)]  # on n3
        cluster.script("kill-node", "n4")
        # the other node's ranks notice by themselves, before SLURM does
        wait_for(lambda: not any(is_alive(pid) for pid in ranks), timeout_s=30)
        cluster.script("start-node", "n4")
        attempts = run.finished()
    finally:
        cluster.script("start-node", "n4")
        run.process.kill()
    assert not all_runs.differs(run)
    assert attempts[0].outcome in ("lost", "failed")
    assert attempts[-1].first_iter >= 10
    assert attempts[-1].outcome == "finished"


def test_stopped_by_its_time_limit(runs: tuple[Runs, dict[str, Run]]) -> None:
    all_runs, started = runs
    attempts = started["limited"].finished(timeout_s=380.0)
    assert not all_runs.differs(started["limited"])
    assert len(attempts) >= 2
    assert all(a.outcome == "stopped" and "SIGUSR2" in a.why for a in attempts[:-1])
    assert all(a.stop_s > 0 for a in attempts[:-1])
    assert attempts[-1].outcome == "finished"


def test_train_sbatch_from_the_repository_and_from_a_folder_of_ones_own(
    cluster: Cluster, tmp_path: Path
) -> None:
    job_ids = {}
    for name, folder in {"repository": ROOT, "own": tmp_path}.items():
        command = [
            *("sbatch", "--parsable", f"--output={tmp_path}/{name}.out", "--cpus-per-task=2"),
            *("--nodes=2", f"{ROOT}/slurm/train.sbatch", "+experiment=digits", "launch.ranks=1"),
            *("trainer.max_iter=4", f"run.dir={tmp_path}/{name}", "hooks.best=null"),
        ]
        env = {**os.environ, "PYTHON": sys.executable}
        job_ids[name] = subprocess.check_output(command, text=True, cwd=folder, env=env).strip()
    for name, job_id in job_ids.items():
        out = tmp_path / f"{name}.out"
        assert cluster.wait(job_id)["JobState"] == "COMPLETED", out.read_text()
        assert "finished: 4 of 4 iterations" in out.read_text()
        assert "\x1b" not in out.read_text()  # srun --unbuffered gives the ranks a terminal
        (attempt,) = read_attempts(tmp_path / name)
        assert (attempt.kept_iter, attempt.nodes) == (4, ["n1", "n2"])


def test_tensorboard_sbatch(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "runs").mkdir()
    script = str(ROOT / "slurm/tensorboard.sbatch")
    job_id = subprocess.check_output(
        ["sbatch", "--parsable", f"--output={out}", script, str(tmp_path / "runs")],
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "USER": "ada"},
    ).strip()
    wait_for(
        lambda: out.exists() and "ssh -N -L 6006:localhost:" in out.read_text(),
        timeout_s=60,
        what=lambda: out.read_text() if out.exists() else "no output",
    )
    line = next(line for line in out.read_text().splitlines() if "ssh" in line)
    assert line.endswith("ada@n1")
    cluster.run("scancel", job_id)


def test_a_sweep_with_one_bad_learning_rate(cluster: Cluster, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "distrain", "-m", "+experiment=digits", "trainer.max_iter=10"),
            *("optim.lr=0.1,0.01,1e30,0.05", "launch=slurm", "launch.ranks=1"),
            *("launch.follow=true", f"run.dir={tmp_path}/sweep", "hooks.eval=null"),
            "hooks.best=null",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[-4:]]
    assert [line[1] for line in lines] == ["finished", "finished", "failed", "finished"]
    assert [line[2] for line in lines] == [
        f"optim.lr={lr}" for lr in ("0.1", "0.01", "1e+30", "0.05")
    ]
    assert "loss" in lines[2]

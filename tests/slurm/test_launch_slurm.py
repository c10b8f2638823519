"""launch=slurm on a real SLURM: submission, stops, requeues, failures, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from counting import Count
from dev_cluster import Cluster, is_alive, parent, wait_for

from distrain.errors import ConfigError, ExitCode, RankFailed
from distrain.launch.slurm.follow import follow
from distrain.launch.slurm.launcher import SlurmLauncher
from distrain.launch.slurm.script import lead_s
from distrain.runfolder.attempts import Attempt, read_attempts

pytestmark = pytest.mark.slurm

LAUNCHER = SlurmLauncher(nodes=2, ranks=2, time_min=30)
LONG = 10**6  # steps: until somebody stops it


def submit(job: Count, launcher: SlurmLauncher = LAUNCHER) -> str:
    (job_id,) = launcher.submit([job])
    return job_id


def started(job: Count, times: int = 1) -> None:
    """Wait until a job counts for the n-th time, and for a few steps more."""
    logs = Path(job.run_dir, "slurm")

    def printed() -> str:
        return "\n".join(path.read_text() for path in logs.glob("*.out"))

    def failed() -> bool:
        return any(attempt.outcome == "failed" for attempt in read_attempts(logs.parent))

    wait_for(lambda: len(job.starts()) >= times or failed(), timeout_s=90, what=printed)
    assert not failed(), printed()
    time.sleep(0.5)


def test_submission_says_where_and_returns_without_torch(cluster: Cluster, tmp_path: Path) -> None:
    code = (
        "import sys; from counting import Count\n"
        "from distrain.launch.slurm.launcher import SlurmLauncher\n"
        "launcher = SlurmLauncher(nodes=2, gpus_per_node=2, sbatch={'comment': 'x y'})\n"
        f"print(launcher.start(Count({str(tmp_path)!r})))\n"
        "assert 'torch' not in sys.modules"
    )
    out = subprocess.check_output([sys.executable, "-c", code], text=True)
    match = re.match(r"job (\d+) \(2 nodes x 2 ranks\): (.*)\n", out)
    assert match is not None, out
    assert match[2] == str(tmp_path)
    job = cluster.wait(match[1])
    assert job["JobState"] == "COMPLETED", (tmp_path / f"slurm/{match[1]}_0_log.out").read_text()
    assert job["NumNodes"] == "2"
    assert job["TresPerNode"] == "gres:gpu:2"
    assert Count(str(tmp_path)).starts() == ["0 4 n1"]
    assert (tmp_path / "slurm").stat().st_mode & 0o777 == 0o700
    (attempt,) = read_attempts(tmp_path)
    assert (attempt.outcome, attempt.nodes, attempt.kept_iter) == ("finished", ["n1", "n2"], 20)


def test_a_job_that_is_cancelled_saves_and_stays_cancelled(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = Count(str(tmp_path), until=LONG)
    job_id = submit(job)
    started(job)
    with pytest.raises(ConfigError, match=rf"job {job_id} \(RUNNING\) works on this run"):
        submit(job)
    cluster.run("scancel", job_id)
    assert follow(job_id, tmp_path) == ExitCode.STOPPED
    (attempt,) = read_attempts(tmp_path)
    assert (attempt.outcome, attempt.requeued) == ("stopped", False)
    assert attempt.kept_iter > 0
    assert "SIGTERM" in attempt.why
    assert cluster.job(job_id)["JobState"] == "CANCELLED"
    assert not cluster.processes()
    # and starting it again continues it
    assert replace(LAUNCHER, follow=True).start(replace(job, until=1)) == ExitCode.FINISHED
    assert job.starts()[1] == f"{attempt.kept_iter} 4 n1"
    assert [a.attempt for a in read_attempts(tmp_path)] == [1, 2]


def test_an_error_on_a_rank_fails_the_job_and_is_told_once(
    cluster: Cluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = Count(str(tmp_path), until=LONG, fail_rank=3, fail_at=10)
    with pytest.raises(RankFailed) as caught:
        replace(LAUNCHER, follow=True).start(job)
    text = str(caught.value)
    assert text.startswith("rank 3 failed: ValueError: user code is wrong (log: ")
    assert text.count("Traceback") == 1
    assert "counting.py" in text
    assert "Traceback" not in capfd.readouterr().out  # whoever catches the error shows it
    (attempt,) = read_attempts(tmp_path)
    assert attempt.outcome == "failed"
    assert cluster.job(attempt.job_id)["JobState"] == "FAILED"
    assert not cluster.processes()


def test_an_agent_that_is_killed_ends_the_attempt_and_the_next_one_continues(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = Count(str(tmp_path), until=100, save_every=5)
    job_id = submit(job)
    started(job)
    ranks = [cluster.rank(job_id, rank) for rank in range(4)]
    agent = parent(ranks[3])
    os.kill(agent, signal.SIGKILL)
    wait_for(lambda: not any(is_alive(pid) for pid in ranks), timeout_s=15)
    assert follow(job_id, tmp_path) == ExitCode.FINISHED
    first, second = read_attempts(tmp_path)
    assert (first.outcome, first.requeued) == ("lost", True)
    assert "n2" in first.why
    assert second.first_iter == first.kept_iter > 0


def test_what_slurm_refuses_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    job = Count(str(tmp_path / "run"))
    with pytest.raises(ConfigError) as no_partition:
        submit(job, replace(LAUNCHER, partition="gold"))
    assert str(no_partition.value) == ("launch.partition=gold: no such one; available: high, low")
    with pytest.raises(ConfigError) as no_gpus:
        submit(job, replace(LAUNCHER, gpus_per_node=3))
    assert str(no_gpus.value) == (
        "launch: no such nodes (nodes=2, gpus_per_node=3, mem=None, cpus_per_task=2); available: "
        "4 nodes of 8 CPUs, 16000 MB, gres gpu:2"
    )
    with pytest.raises(ConfigError) as no_nodes:
        LAUNCHER.plan(job) and replace(LAUNCHER, nodes=5).plan(job)
    assert "nodes=5" in str(no_nodes.value)
    with pytest.raises(ConfigError) as no_option:
        submit(job, replace(LAUNCHER, sbatch={"colour": "red"}))
    assert str(no_option.value).startswith("launch=slurm: SLURM refuses the job: ")
    assert "colour" in str(no_option.value)


def test_the_plan_is_the_script_and_what_slurm_says_of_it(cluster: Cluster, tmp_path: Path) -> None:
    launcher = replace(LAUNCHER, partition="high", mem="2G", qos=None, constraint=None, signal_s=90)
    text = launcher.plan(Count(str(tmp_path / "run")))
    assert text.startswith("#!/bin/bash\n")
    for line in ("--nodes=2", "--partition=high", "--mem=2G", "--time=30", "--signal=USR2@90"):
        assert f"\n#SBATCH {line}\n" in text
    assert "\n#SBATCH --requeue\n" in text
    assert re.search(r"# sbatch --test-only: sbatch: Job \d+ to start at", text)
    assert not (tmp_path / "run").exists()
    assert cluster.run("squeue", "--noheader") == ""


def test_the_lead_time_follows_from_the_stops_before(tmp_path: Path) -> None:
    assert lead_s(LAUNCHER, tmp_path) == 120
    assert lead_s(replace(LAUNCHER, time_min=2), tmp_path) == 60  # half of the limit
    attempt = Attempt(1, "7", 0, ["n1"], 0.0, stop_s=45.2)
    (tmp_path / "attempts.jsonl").write_text(json.dumps(vars(attempt)) + "\n")
    assert lead_s(LAUNCHER, tmp_path) == 91 + 60
    assert lead_s(replace(LAUNCHER, signal_s=30), tmp_path) == 30


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"nodes": 0}, "nodes=0: expected an integer >= 1"),
        ({"max_requeues": -1}, "max_requeues=-1: expected an integer >= 0"),
        ({"min_nodes": 3}, "min_nodes=3: expected at most launch.nodes=2"),
        ({"signal_s": 1800}, "signal_s=1800: expected less than the time limit"),
    ],
)
def test_arguments_out_of_range(wrong: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        replace(LAUNCHER, **wrong)  # type: ignore[arg-type]


def test_without_slurm_it_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="no sbatch, srun, scontrol on the PATH.*launch=local"):
        submit(Count(str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    assert "# not tested: launch=slurm: no sbatch" in LAUNCHER.plan(Count(str(tmp_path / "run")))


def test_without_a_controller_the_plan_shows_the_script(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "slurm.conf"
    conf.write_text(re.sub(r"(?m)^SlurmctldPort=.*", "SlurmctldPort=1", cluster.conf.read_text()))
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", str(conf))
        text = LAUNCHER.plan(Count(str(tmp_path / "run")))
    assert "#SBATCH --nodes=2" in text
    assert "# not tested, SLURM does not answer: " in text


def test_a_run_folder_that_no_node_sees(cluster: Cluster) -> None:
    run_dir = cluster.root / "local" / "run"  # each node has its own there
    with pytest.raises(ConfigError, match="must be on a file system that all nodes share"):
        replace(LAUNCHER, follow=True).start(Count(str(run_dir)))


def test_a_node_that_does_not_come_is_named(cluster: Cluster) -> None:
    run_dir = cluster.root / "local" / "run2"
    pid = (cluster.root / "run" / "node.n1.pid").read_text().strip()
    (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    local = str(cluster.root / "local")
    subprocess.check_call(["nsenter", "-t", child, "-m", "umount", local])  # n1 sees ours
    try:
        with pytest.raises(RankFailed, match=r"no record from n2 in launch.join_s=3 s \(1 of 2"):
            replace(LAUNCHER, follow=True, join_s=3).start(Count(str(run_dir)))
    finally:
        cluster.script("kill-node", "n1")


def test_a_job_goes_on_with_the_nodes_that_remain(cluster: Cluster, tmp_path: Path) -> None:
    job = Count(str(tmp_path), until=40, save_every=10)
    launcher = replace(LAUNCHER, min_nodes=1, sbatch={"exclude": "n1,n2"})
    job_id = submit(replace(job, until=LONG), launcher)
    started(job)
    # as after a loss that SLURM has noticed
    cluster.script("kill-node", "n4")
    cluster.run("scontrol", "update", "nodename=n4", "state=down", "reason=test")
    started(job, 2)
    cluster.run("scancel", job_id)
    assert follow(job_id, tmp_path) == ExitCode.STOPPED
    first, second = read_attempts(tmp_path)
    assert (first.nodes, second.nodes) == (["n3", "n4"], ["n3"])
    assert job.starts() == ["0 4 n3", f"{first.kept_iter} 2 n3"]


def test_edits_after_submission_change_nothing(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, run_dir = tmp_path / "project", tmp_path / "project" / "runs" / "x"
    project.mkdir()
    (project / "mine.py").write_text(VERSIONED.format(version="old", run_dir=str(run_dir)))
    (project / "new.py").write_text("")
    subprocess.check_call(["git", "init", "-q"], cwd=project)
    subprocess.check_call(["git", "add", "mine.py"], cwd=project)
    monkeypatch.chdir(project)
    submit_code = (
        "import sys; sys.path.insert(0, ''); import mine\n"
        "from distrain.launch.slurm.launcher import SlurmLauncher\n"
        "launcher = SlurmLauncher(snapshot=True, sbatch={'begin': 'now+2'})\n"
        "print(*launcher.submit([mine.Job()]))"
    )
    job_id = subprocess.check_output([sys.executable, "-c", submit_code], text=True).strip()
    copied = run_dir / "slurm" / "submitted_code"
    assert {path.name for path in copied.iterdir()} == {"mine.py", "new.py"}
    (project / "mine.py").write_text(VERSIONED.format(version="new", run_dir=str(run_dir)))
    assert cluster.wait(job_id)["JobState"] == "COMPLETED"
    assert (run_dir / "version").read_text() == "old"
    # without a repository there is nothing to copy
    monkeypatch.chdir("/")
    with pytest.raises(ConfigError, match="launch.snapshot=true copies the files that git tracks"):
        submit(Count(str(tmp_path / "other")), replace(LAUNCHER, snapshot=True))


VERSIONED = """
from pathlib import Path

class Job:
    run_dir = {run_dir!r}

    def __call__(self):
        Path(self.run_dir, "version").write_text({version!r})
        return 0
"""


def test_a_batch_script_of_ones_own_uses_its_allocation(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "own.sbatch"
    counting = Path(__file__).with_name("counting.py")
    script.write_text(f"#!/bin/bash\nexec {sys.executable} {counting} {tmp_path / 'run'}\n")
    options = ["--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/out", "--parsable"]
    job_id = cluster.run("sbatch", *options, str(script)).strip()
    job = cluster.wait(job_id)
    assert job["JobState"] == "COMPLETED", (tmp_path / "out").read_text()
    assert Count(str(tmp_path / "run")).starts() == ["0 4 n1"]
    assert read_attempts(tmp_path / "run")[0].outcome == "finished"

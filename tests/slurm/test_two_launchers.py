"""One run, two ways to start it: the second is refused while the first is at work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dev_cluster import Cluster

pytestmark = [pytest.mark.slurm]


def distrain(
    folder: Path, *overrides: str, max_iter: int = 4, path: str = os.environ["PATH"]
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distrain", "+experiment=digits"]
    return subprocess.run(
        [*command, f"trainer.max_iter={max_iter}", *overrides],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path},
    )


@pytest.fixture
def was_on_a_cluster(tmp_path: Path) -> Path:
    """A folder with a run of two iterations that job 7 worked on."""
    done = distrain(tmp_path, "launch.in_process=true", max_iter=2)
    assert done.returncode == 0, done.stderr
    (tmp_path / "runs/digits/slurm").mkdir()
    (tmp_path / "runs/digits/slurm/submitted.json").write_text('{"job_id": "7"}')
    return tmp_path


def test_a_local_start_is_refused_while_a_job_waits(cluster: Cluster, tmp_path: Path) -> None:
    submitted = distrain(tmp_path, "launch=slurm", "+launch.sbatch.begin=now+1hour")
    assert submitted.returncode == 0, submitted.stderr
    job_id = json.loads((tmp_path / "runs/digits/slurm/submitted.json").read_text())["job_id"]
    refused = distrain(tmp_path, "launch.in_process=true")
    assert refused.returncode == 2, refused.stderr
    assert f"job {job_id} (PENDING" in refused.stderr
    assert f"`scancel {job_id}`" in refused.stderr
    subprocess.run(["scancel", job_id], check=True)
    accepted = distrain(tmp_path, "launch.in_process=true")
    assert accepted.returncode == 0, accepted.stderr


def test_without_slurm_at_hand_a_run_that_was_on_a_cluster_goes_on(was_on_a_cluster: Path) -> None:
    path = os.pathsep.join(
        each for each in os.environ["PATH"].split(os.pathsep) if not Path(each, "scontrol").exists()
    )
    goes_on = distrain(was_on_a_cluster, "launch.in_process=true", path=path)
    assert goes_on.returncode == 0, goes_on.stderr


def test_a_silent_slurm_is_no_leave_to_start(was_on_a_cluster: Path) -> None:
    scontrol = was_on_a_cluster / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"
    refused = distrain(was_on_a_cluster, "launch.in_process=true", path=path)
    assert refused.returncode == 2, refused.stderr
    assert "job 7" in refused.stderr
    assert "Unable to contact" in refused.stderr
    assert "slurm/submitted.json" in refused.stderr

"""One run, two ways to start it: the second is refused while the first is at work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from dev_cluster import Cluster

pytestmark = [pytest.mark.slurm]


def distrain(folder: Path, *overrides: str, path: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "distrain", "+experiment=digits"]
    env = os.environ | ({"PATH": path} if path else {})
    if not any(each.startswith("trainer.max_iter") for each in overrides):
        command.append("trainer.max_iter=4")
    return subprocess.run(
        [*command, *overrides], cwd=folder, capture_output=True, text=True, env=env
    )


def test_a_local_start_is_refused_while_a_job_waits(cluster: Cluster, tmp_path: Path) -> None:
    submitted = distrain(tmp_path, "launch=slurm", "+launch.sbatch.begin=now+1hour")
    assert submitted.returncode == 0, submitted.stderr
    job_id = (tmp_path / "runs/digits/slurm/submitted.json").read_text().split('"')[3]
    refused = distrain(tmp_path, "launch.in_process=true")
    assert refused.returncode == 2, refused.stderr
    assert f"job {job_id} (PENDING" in refused.stderr
    assert f"`scancel {job_id}`" in refused.stderr
    subprocess.run(["scancel", job_id], check=True)
    accepted = distrain(tmp_path, "launch.in_process=true")
    assert accepted.returncode == 0, accepted.stderr


def test_without_slurm_at_hand_a_run_that_was_on_a_cluster_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "runs/digits/slurm"
    assert distrain(tmp_path, "launch.in_process=true", "trainer.max_iter=2").returncode == 0
    folder.mkdir()
    (folder / "submitted.json").write_text('{"job_id": "7"}')
    path = os.pathsep.join(
        each for each in os.environ["PATH"].split(os.pathsep) if not Path(each, "scontrol").exists()
    )
    goes_on = distrain(tmp_path, "launch.in_process=true", path=path)
    assert goes_on.returncode == 0, goes_on.stderr


def test_a_silent_slurm_is_no_leave_to_start(tmp_path: Path) -> None:
    folder = tmp_path / "runs/digits/slurm"
    assert distrain(tmp_path, "launch.in_process=true", "trainer.max_iter=2").returncode == 0
    folder.mkdir()
    (folder / "submitted.json").write_text('{"job_id": "7"}')
    (tmp_path / "bin").mkdir()
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2; exit 1\n")
    scontrol.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    refused = distrain(tmp_path, "launch.in_process=true", path=path)
    assert refused.returncode == 2, refused.stderr
    assert "job 7" in refused.stderr
    assert "Unable to contact" in refused.stderr
    assert "slurm/submitted.json" in refused.stderr

"""slurm/dev-cluster: a real SLURM of several nodes on this machine."""

import os
import subprocess
from pathlib import Path

import pytest
from dev_cluster import SCRIPT, Cluster, wait_for

pytestmark = pytest.mark.slurm


def test_nodes_have_names_gpus_and_processes_of_their_own(cluster: Cluster) -> None:
    command = "echo $(hostname) $CUDA_VISIBLE_DEVICES $(getent hosts n2 | cut -c1-6) $(ls /proc)"
    text = cluster.run(
        "srun", "-N4", "--ntasks-per-node=1", "--gpus-per-node=2", "sh", "-c", command
    )
    lines = [line.split() for line in text.splitlines() if line.startswith("n")]
    assert sorted(line[0] for line in lines) == ["n1", "n2", "n3", "n4"]
    assert all(line[1] == "0,1" for line in lines)
    assert all(line[2] == "127.0." for line in lines)
    own = [len([word for word in line[3:] if word.isdigit()]) for line in lines]
    assert max(own) < 20  # /proc holds the node's processes only


def test_each_node_has_a_disk_of_its_own_beside_shared_files(cluster: Cluster) -> None:
    local, shared = cluster.root / "local" / "x", cluster.root / "x"
    cluster.run("srun", "-wn1", "sh", "-c", f"echo 1 > {local}; echo 1 > {shared}")
    assert cluster.run("srun", "-wn1", "cat", str(local)) == "1\n"
    assert shared.read_text() == "1\n"
    assert not local.exists()
    other = subprocess.run(["srun", "-wn2", "cat", str(local)], capture_output=True, text=True)
    assert other.returncode == 1
    assert "No such file" in other.stderr


def test_what_the_nodes_lack_is_refused(cluster: Cluster) -> None:
    done = subprocess.run(
        ["sbatch", "--gpus-per-node=3", "--wrap=true"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "not available" in done.stderr


def test_a_killed_node_takes_its_processes_along_and_comes_back(cluster: Cluster) -> None:
    cluster.run("sbatch", "-wn1", "-o/dev/null", "--wrap=sleep 98765")
    wait_for(lambda: any("98765" in c for c in cluster.processes().values()), timeout_s=20)
    assert cluster.script("kill-node", "n1").returncode == 0
    wait_for(lambda: not cluster.processes(), timeout_s=5, what=lambda: str(cluster.processes()))
    again = cluster.script("kill-node", "n1")
    assert again.returncode == 1
    assert "n1 does not run" in again.stderr
    assert cluster.script("start-node", "n1").returncode == 0
    assert cluster.run("srun", "-wn1", "hostname") == "n1\n"


def test_two_clusters_side_by_side_start_twice_and_leave_nothing(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = Cluster(cluster.root.parent / "d")
    assert other.script("env").returncode == 1
    assert other.script("start", "1").returncode == 0
    try:
        again = other.script("start", "1")
        assert (again.returncode, again.stderr) == (0, "")
        assert "stop it first" in other.script("start", "2").stderr
        exported = other.script("env").stdout
        assert exported == f"export SLURM_CONF={other.conf}\n"
        of_other = {**os.environ, "SLURM_CONF": str(other.conf)}
        names = subprocess.check_output(["sinfo", "-h", "-o%N"], text=True, env=of_other).split()
        assert set(names) == {"n1"}
        job = ["srun", "sh", "-c", "hostname; sleep 0.1"]
        assert subprocess.check_output(job, text=True, env=of_other) == "n1\n"
        # a node completes for a moment after its job has ended
        wait_for(lambda: "n1 idle gpu:2" in other.script("status").stdout, timeout_s=20)
    finally:
        assert other.script("stop").returncode == 0
    assert not other.root.exists()
    assert other.script("stop").returncode == 0
    left = [p for p in Path("/proc").glob("[0-9]*") if str(other.conf) in _environment(p)]
    assert not left
    assert cluster.run("srun", "hostname").startswith("n")


def test_a_folder_of_others_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    done = subprocess.run(
        [SCRIPT, "--root", tmp_path, "start"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "not a dev-cluster's folder" in done.stderr or "too long" in done.stderr
    assert (tmp_path / "precious").exists()


def _environment(process: Path) -> str:
    try:
        return (process / "environ").read_text(errors="replace")
    except OSError:
        return ""

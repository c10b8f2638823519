"""One real SLURM for all tests here: made by slurm/dev-cluster, gone at the end."""

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from dev_cluster import NODES, SCRIPT, Cluster, wait_for


@pytest.fixture(scope="session")
def session_cluster() -> Iterator[Cluster]:
    # munge's socket needs a short path, and folders that others may enter
    with tempfile.TemporaryDirectory(prefix="distrain-") as folder:
        Path(folder).chmod(0o755)
        cluster = Cluster(Path(folder) / "c")
        for command in ("install",), ("start", str(NODES)):
            done = cluster.script(*command)
            if done.returncode:
                pytest.skip(f"no SLURM here: {' '.join(command)}: {done.stderr.strip()[-500:]}")
        guard = _stop_after_us(cluster)
        outer = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(cluster.conf)
        try:
            yield cluster
        finally:
            os.environ.pop("SLURM_CONF")
            if outer is not None:
                os.environ["SLURM_CONF"] = outer
            os.kill(guard, signal.SIGTERM)
            stopped = cluster.script("stop")
        assert stopped.returncode == 0, stopped.stderr


def _stop_after_us(cluster: Cluster) -> int:
    """Start a process that stops the cluster should this one be killed: no fixture ends then.

    It is no child of ours, for other tests count those. Returns its pid.
    """
    watch = 'while [ -d "/proc/$1" ]; do sleep 2; done; "$2" --root "$3" stop; rmdir "${3%/*}"'
    start = 'setsid sh -c "$@" </dev/null >/dev/null 2>&1 & echo $!'
    arguments = [watch, "guard", str(os.getpid()), str(SCRIPT), str(cluster.root)]
    done = subprocess.run(
        ["sh", "-c", start, "start", *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return int(done.stdout)


@pytest.fixture
def cluster(session_cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The cluster, with all nodes up and free after the test; its jobs can import what we can."""
    folders = [str(SCRIPT.parents[1]), str(Path(__file__).parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(folders))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield session_cluster
    subprocess.run(["scancel", "--user", str(os.getuid())], timeout=60, check=False)
    for i in range(1, NODES + 1):
        session_cluster.script("start-node", f"n{i}")
    status = partial(session_cluster.script, "status")
    wait_for(session_cluster.idle, timeout_s=60, what=lambda: status().stdout)

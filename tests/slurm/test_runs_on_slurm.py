"""python -m distrain.runs beside a real SLURM: a job that waits and one that runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dev_cluster import Cluster, wait_for

from distrain.runfolder.attempts import read_attempts
from distrain.runs.__main__ import run

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(400)]

DIGITS = (
    *("+experiment=digits", "trainer.window=2", "hooks.eval=null", "hooks.best=null"),
    *("+hooks.slow._target_=slow_hook.Slow", "launch=slurm", "launch.nodes=2", "launch.ranks=2"),
)


def submit(folder: Path, name: str, *argv: str) -> None:
    command = [sys.executable, "-m", "distrain", *DIGITS, f"run.name={name}", *argv]
    env = os.environ | {"SLOW_S": "0.2"}
    subprocess.run(command, cwd=folder, env=env, check=True, stdout=subprocess.DEVNULL, timeout=100)


def test_a_waiting_and_a_running_job_are_told_stopped_and_resumed(
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def runs() -> dict[str, dict[str, object]]:
        assert run(["--json"]) == 0
        return {each["name"]: each for each in json.loads(capsys.readouterr().out)}

    monkeypatch.chdir(tmp_path)
    submit(tmp_path, "works")
    submit(tmp_path, "waits", "+launch.sbatch.begin=now+1hour")
    found = wait_for(
        lambda: (known := runs())["works"]["iteration"] > 4 and known,  # type: ignore[operator]
        timeout_s=120,
        what=lambda: str(runs()["works"]),
    )
    assert found["works"]["state"] == "running"
    assert found["works"]["why"] == f"job {found['works']['job_id']}: RUNNING"
    assert (found["works"]["ranks"], found["waits"]["ranks"]) == (4, 4)
    assert (found["waits"]["state"], found["waits"]["iteration"]) == ("queued", 0)

    assert run(["stop", "waits"]) == 0
    assert "waits: stopped at iteration 0 of 500 (0 saved)" in capsys.readouterr().out
    assert cluster.job(str(found["waits"]["job_id"]))["JobState"] == "CANCELLED"

    assert run(["stop", "works"]) == 0
    (attempt,) = read_attempts(tmp_path / "runs/works")
    assert (attempt.outcome, attempt.requeued) == ("stopped", False)
    assert "SIGUSR2" in attempt.why
    done = attempt.kept_iter
    assert done == attempt.last_iter > 4
    said = capsys.readouterr().out
    assert f"works: stopped at iteration {done} of 500 ({done} saved)" in said
    assert runs()["works"]["state"] == "stopped"
    assert not cluster.processes()

    more = [f"trainer.max_iter={done + 2}", "launch.follow=true"]
    command = [sys.executable, "-m", "distrain.runs", "resume", "works", *more]
    subprocess.run(command, check=True, capture_output=True, timeout=200)
    assert (runs()["works"]["state"], runs()["works"]["iteration"]) == ("finished", done + 2)
    assert [each.outcome for each in read_attempts(tmp_path / "runs/works")] == [
        *("stopped", "finished")
    ]

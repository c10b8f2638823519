"""The project of a user, in a folder of their own, run by the command of its README."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from run_module import run_module
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
COMMAND = ["-m", "distrain", "--config-dir", "conf", "+experiment=mine"]


def run(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the README's command in `folder`; distrain itself is found as if it were installed."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return run_module(*COMMAND[1:], *overrides, cwd=folder, env=env)


def images(run_dir: Path) -> list[str]:
    """Return the names of the images that TensorBoard finds in a run."""
    reader = EventAccumulator(str(run_dir))
    reader.Reload()
    assert "loss" in reader.Tags()["scalars"]
    return list(reader.Tags()["images"])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the example, far from this repository."""
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "examples" / "own_project", folder)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    return folder


def test_readme_gives_the_command_tested_here() -> None:
    text = (ROOT / "examples" / "own_project" / "README.md").read_text()
    assert "python " + " ".join(COMMAND) in text


@pytest.mark.ranks
def test_own_project_learns_on_two_ranks_from_its_own_folder(project: Path) -> None:
    done = run(project, "launch.ranks=2", "trainer.max_iter=200", "hooks.decision_map.period=50")
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = project / "runs" / "mine"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    accuracies = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row]
    assert accuracies[-1] > 0.9
    assert rows[-1]["loss"] < rows[0]["loss"] / 2
    assert images(run_dir) == ["decision_map"]


@pytest.mark.ranks
def test_own_hook_can_be_left_out(project: Path) -> None:
    done = run(
        project,
        "launch.ranks=1",
        "trainer.max_iter=3",
        "trainer.window=1",
        "hooks.decision_map=null",
        "run.name=bare",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert images(project / "runs" / "bare") == []


def test_a_typo_in_an_own_key_is_one_line(project: Path) -> None:
    done = run(project, "+model.widht=32")
    assert done.returncode == 2
    assert "model.widht" in done.stderr
    assert "did you mean width?" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "runs").exists()

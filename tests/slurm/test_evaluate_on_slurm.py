"""`python -m distrain.evaluate RUN launch=slurm`, on two nodes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from dev_cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

SIZE = 359  # images of digits in data.eval
JOB = ("launch=slurm", "launch.nodes=2", "launch.ranks=2", "launch.follow=true")


def command(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", module, *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=200)


def test_it_gives_the_values_of_training_and_each_prediction_once(
    cluster: Cluster, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "predictions.jsonl"
    arguments = ("+experiment=digits", "trainer.max_iter=4", "launch.in_process=true")
    done = command("distrain", *arguments, f"run.dir={run}")
    assert done.returncode == 0, done.stderr
    trained = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["eval/accuracy"]

    done = command("distrain.evaluate", run, *JOB, "--predict", out)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"accuracy             {trained:.6g}" in done.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(SIZE))

    (file,) = run.glob("evaluations/*/metrics.json")
    assert json.loads(file.read_text())["metrics"]["accuracy"] == trained

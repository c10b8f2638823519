"""`python -m distrain.checkpoint`: a table for one run, the digests of two side by side."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_cases import checkpoints, path_of, small_state

from distrain.checkpoint import format as fmt
from distrain.checkpoint.store import Score
from distrain.cli.checkpoint import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run's folder with checkpoints of the iterations 100 and 200, the first the best."""
    store = checkpoints(tmp_path / "run" / "checkpoints")
    store.save(100, small_state(100), world_size=2, best={"accuracy": 0.5})
    store.save(200, small_state(200), world_size=2)
    store.close()
    return tmp_path / "run"


def digest(run: Path, iteration: int, part: str) -> str:
    manifest = fmt.read_manifest(str(path_of(run / "checkpoints", iteration)))
    return str(manifest["parts"][part])[:12]


def test_the_table_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(path_of(run / "checkpoints", 100) / fmt.STATE_FILE, 5)
    assert main([str(run)]) == 0
    header, old, new, _, title, *parts = capsys.readouterr().out.splitlines()
    assert header.split() == ["iteration", "ranks", "size", "state"]
    assert old.split()[:4] == ["100", "2", old.split()[2], "KB"]
    assert "damaged:" in old
    assert "state.json has 5 bytes, not" in old
    assert old.endswith("(best)")
    assert new.split()[:2] == ["200", "2"]
    assert new.split()[3:] == ["KB", "valid"]
    assert title == "digests of iteration 200"
    assert [line.split() for line in parts] == [
        [part, digest(run, 200, part)]
        for part in ("model", "optimizer", "schedule", "rng", "hooks", "histories")
    ]


def test_the_digests_of_one_iteration(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--iteration", "100"]) == 0
    text = capsys.readouterr().out
    assert "digests of iteration 100" in text
    assert digest(run, 100, "model") in text
    assert digest(run, 200, "model") not in text


def test_the_checkpoint_folder_itself_will_do(run: Path) -> None:
    assert main([str(run / "checkpoints")]) == 0


def test_equal_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = small_state(200)
    state["histories"]["perf/step_s"] = {"values": torch.ones(3)}
    other = checkpoints(tmp_path / "other" / "checkpoints")
    other.save(200, state, world_size=1)
    assert main([str(run), str(tmp_path / "other")]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["iteration", "200", "200", "="]
    assert [row.split() for row in rows[1:]] == [
        [part, digest(run, 200, part), digest(run, 200, part), "="]
        for part in ("model", "optimizer", "schedule", "rng", "hooks", "histories")
    ]


def test_unequal_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = small_state(200)
    state["optimizer"]["state"][0]["exp_avg"][0, 0] += 1
    del state["rng"]
    checkpoints(tmp_path / "other" / "checkpoints").save(200, state, world_size=1)
    assert main([str(run), str(tmp_path / "other"), "--iteration", "200"]) == 1
    signs = {row.split()[0]: row.split()[-1] for row in capsys.readouterr().out.splitlines()[1:]}
    assert signs == {
        **{"iteration": "=", "model": "=", "optimizer": "≠", "schedule": "=", "rng": "≠"},
        **{"hooks": "=", "histories": "="},
    }


def test_runs_of_different_length_differ(run: Path, tmp_path: Path) -> None:
    checkpoints(tmp_path / "other" / "checkpoints", 100)
    assert main([str(run), str(tmp_path / "other")]) == 1
    assert main([str(run), str(tmp_path / "other"), "--iteration", "100"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such run folder"),
        (["empty"], "empty: no checkpoints in empty/checkpoints"),
        (["run", "nowhere"], "nowhere: no such run folder"),
        (["run", "empty"], "empty: no valid checkpoint"),
        (["run", "--iteration", "5"], "run: no checkpoint of iteration 5"),
        (["run", "run", "--iteration", "5"], "run: no checkpoint of iteration 5"),
        (["run", "--iteration", "100"], "run: the checkpoint of iteration 100 is damaged"),
    ],
)
def test_nothing_to_look_at(
    run: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(run.parent)
    os.truncate(path_of(run / "checkpoints", 100) / fmt.STATE_FILE, 5)
    Path("empty").mkdir()
    assert main(arguments) == 2
    assert capsys.readouterr().err.strip() == message


def test_an_option_that_is_cut_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:  # not "valid" without the test that was asked for
        main([str(run), "--verify"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --verify" in capsys.readouterr().err


def test_no_valid_one_is_status_1(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for iteration in (100, 200):
        (path_of(run / "checkpoints", iteration) / fmt.MANIFEST_FILE).unlink()
    assert main([str(run)]) == 1
    text = capsys.readouterr().out
    assert text.count("manifest.json is missing") == 2
    assert "digests" not in text


def test_from_the_shell_and_without_torch(run: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code = (
        "import runpy, sys\n"
        "try:\n"
        "    runpy.run_module('distrain.checkpoint', run_name='__main__', alter_sys=True)\n"
        "finally:\n"
        "    print(*sys.modules, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, str(run), str(run)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0
    assert "iteration     200" in done.stdout
    modules = done.stderr.split()
    assert "distrain.checkpoint.format" in modules
    assert not {"torch", "numpy"} & {*modules}


def test_places_among_the_best_few(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = checkpoints(tmp_path / "run" / "checkpoints")
    for iteration, value in (100, 0.5), (200, 0.9), (300, 0.1):
        best = {"accuracy": value} if value > 0.4 else {}
        scores = {"accuracy": Score(value, larger_is_better=True, keep=2)}
        store.save(iteration, small_state(iteration), world_size=2, best=best, scores=scores)
    store.close()
    assert main([str(tmp_path / "run")]) == 0
    first, second, third = capsys.readouterr().out.splitlines()[1:4]
    assert first.endswith("(best 2 of 2)")
    assert second.endswith("(best 1 of 2)")
    assert third.endswith("valid")


@pytest.mark.parametrize("module", ["distrain.checkpoint", "distrain.runs"])
def test_a_reader_that_leaves_is_no_error(run: Path, module: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `head` does
    (run / "run.yaml").write_text("seed: 0\n")
    folder = run if module == "distrain.checkpoint" else run.parent
    words = [sys.executable, "-m", module, str(folder)]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")

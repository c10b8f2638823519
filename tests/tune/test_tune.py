"""Sweeps that optimize: Hydra's Optuna sweeper gets objectives; successive halving by resuming."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf
from run_module import run_module

from distrain.cli.sweep import check_objective, swept_values
from distrain.errors import ConfigError
from distrain.runfolder.objective import objective
from distrain.tune.halving import build_parser, main, plan
from distrain.tune.training import Runner, Trial, _job_arguments

DIGITS = ["+experiment=digits", "launch.in_process=true", "hooks.eval.period=4"]


def command(*arguments, module="distrain", **options):
    return run_module(module, *arguments, **options)


def test_no_run_is_promoted_while_another_cannot_start(tmp_path):
    arguments = [*TUNE, *DIGITS, "optim.lr=nan,0.1"]
    done = command(*arguments, module="distrain.tune", cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "1 of 2 runs could not start; none is promoted without them" in done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()[-2:]] == ["4", "0"]


def test_a_warning_of_a_library_is_not_the_reason_of_a_refusal(monkeypatch):
    text = (
        "old.py:3: FutureWarning: gone soon\ndistrain: run.dir=a: refused\ndistrain: run.dir=b: too"
    )
    done = subprocess.CompletedProcess([], 2, "", text)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    runner = Runner.__new__(Runner)
    monkeypatch.setattr(runner, "_arguments", lambda trial: [], raising=False)
    with pytest.raises(ConfigError, match=r"^run.dir=a: refused$"):
        runner._check_same([Trial([], Path("a"))])


def test_optuna_maximizes_the_metric_and_counts_a_failed_run(tmp_path):
    done = command(
        *("-m", *DIGITS, "trainer.max_iter=4", "hydra/sweeper=optuna", "run.name=search"),
        *("hydra.sweeper.n_trials=3", "hydra.sweeper.n_jobs=1", "sweep.metric=eval/accuracy"),
        *("hydra.sweeper.direction=maximize", "hydra.sweeper.max_failure_rate=0.5"),
        *("hydra.sweeper.sampler.seed=1", "optim.lr=choice(0.2,nan)", "hydra.verbose=false"),
        cwd=tmp_path,
    )
    assert "optim.lr=nan: expected a number" in done.stderr  # one failed, and the search went on
    folders = [path for path in (tmp_path / "runs/search").iterdir() if path.is_dir()]
    assert [path.name for path in folders] == ["optim.lr=0.2"]
    best = objective(folders[0], "eval/accuracy", mode="max")
    assert 0 < best < 1


@pytest.mark.parametrize(
    ("sweep", "direction", "waits", "message"),
    [
        (
            {},
            "minimize",
            True,
            "direction=minimize: expected maximize, as sweep.mode=max",
        ),
        (
            {"metric": None},
            "minimize",
            True,
            "sweep.metric: expected the scalar that a.Sweeper optimizes",
        ),
        ({"mode": "min"}, "minimize", False, "sweep.metric=eval/accuracy: expected launch=local"),
    ],
)
def test_a_sweep_that_cannot_optimize_is_one_line(sweep, direction, waits, message):
    hydra = OmegaConf.create({"mode": "MULTIRUN", "sweeper": {"_target_": "a.Sweeper"}})
    hydra.mode, hydra.sweeper.direction = RunMode.MULTIRUN, direction
    conf = {"sweep": {"metric": "eval/accuracy", "mode": "max"} | sweep}
    with pytest.raises(ConfigError, match=message):
        check_objective(conf, hydra, waits=waits)
    hydra.mode = RunMode.RUN
    check_objective(conf, hydra, waits=waits)


TUNE = ["--metric", "eval/accuracy", "--rungs", "4,8", "--keep", "0.5", "--folder", "runs/s"]


def test_halving_survives_a_kill_and_promotes_by_resuming(tmp_path):
    mirror = f"checkpoint.mirror=file://{tmp_path}/mirror/${{run.name}}"
    arguments = [*TUNE, *DIGITS, mirror, "optim.lr=0.1,0.0001"]
    words = [sys.executable, "-m", "distrain.tune", *arguments]
    killed = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    for line in killed.stdout:
        if line.startswith("optim.lr=0.1:"):  # one run has come to the first rung
            break
    time.sleep(1)  # the next one is starting
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    done = command(*arguments, module="distrain.tune", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines()[-2:]]
    assert [row[1] for row in table] == ["8", "4"]
    assert table[0][0] == "optim.lr=0.1"
    best = objective(tmp_path / "runs/s/optim.lr=0.1", "eval/accuracy", mode="max", max_iter=8)
    assert float(table[0][2]) == pytest.approx(best, rel=1e-4)
    straight = [*DIGITS, "optim.lr=0.1", "trainer.max_iter=8", "run.dir=straight"]
    assert command(*straight, cwd=tmp_path).returncode == 0
    words = ["runs/s/optim.lr=0.1", "straight"]
    compared = command(*words, module="distrain.checkpoint", cwd=tmp_path).stdout
    same = {line.split()[0] for line in compared.splitlines() if line.endswith("=")}
    assert {"model", "optimizer", "schedule", "histories", "stream", "rng"} <= same, compared
    mirrored = {path.parent.name for path in tmp_path.glob("mirror/*/*/iter_*8")}
    assert mirrored == {"optim.lr=0.1"}, "each run has a place of its own"


def test_a_run_that_ends_itself_is_compared_by_its_value(tmp_path):
    stop = "{_target_: distrain.hooks.EarlyStopping, metric: eval/accuracy, patience: 1, "
    stop += "min_delta: 1}"
    arguments = [*TUNE, *DIGITS[:2], "hooks.eval.period=1", "trainer.window=1", "optim.lr=0.1,1e-9"]
    done = command(*arguments, f"+hooks.stop={stop}", module="distrain.tune", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rung 2 of 2: 1 runs to 8 iterations" in done.stdout
    table = [line.split() for line in done.stdout.splitlines()[-2:]]
    assert [row[1] for row in table] == ["2", "2"]  # iterations
    assert float(table[0][2]) >= float(table[1][2])


def test_runs_of_another_configuration_are_not_taken(tmp_path):
    arguments = [*TUNE, *DIGITS, "optim.lr=0.1,0.01"]
    assert command(*arguments, module="distrain.tune", cwd=tmp_path).returncode == 0
    again = command(*arguments, "launch.max_restarts=1", module="distrain.tune", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = command(*arguments, "model.width=8", module="distrain.tune", cwd=tmp_path)
    assert other.returncode == 2, other.stdout
    (line,) = other.stderr.splitlines()
    assert "optim.lr=0.1: this run has another configuration (model.width: 24 -> 8)" in line
    assert "give another --folder" in line
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_what_to_tell_a_launcher_that_submits():
    slurm = {"_target_": "distrain.launch.slurm.launcher.SlurmLauncher", "follow": True}
    assert _job_arguments(slurm, None) == ["launch.follow=false"]
    limited = _job_arguments({**slurm, "array_parallelism": None}, 3)
    assert limited == ["launch.follow=false", "launch.array_parallelism=3"]
    with pytest.raises(ConfigError, match="--parallel 3: .*SlurmLauncher has no limit of jobs"):
        _job_arguments(slurm, 3)
    assert _job_arguments({"_target_": "distrain.launch.local.LocalLauncher"}, 3) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rungs", "8,4"], "--rungs 8,4: expected growing integers"),
        (["--keep", "1"], "--keep 1.0: expected a number between 0 and 1"),
        (
            ["trainer.max_iter=9"],
            "trainer.max_iter=9: expected --rungs, whose last one is the length",
        ),
        ([], "expected at least one key with several values"),
        (["optim.lr=interval(0,1)"], "optim.lr=interval(0,1): expected a list of values"),
        (["optim.lrr=1,2"], "optim.lrr: no such key; did you mean optim.lr?"),
        (["optim.lr=1,2", "--folder", "s3://bucket/x"], "--folder=s3:/bucket/x: expected a path"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*TUNE, "+experiment=digits", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("arguments", "added"),
    [
        ([], ["hooks.eval.period=4"]),
        (["++hooks.eval.period=2"], []),
        (["hooks.eval=null"], []),
        (["~hooks.eval"], []),
    ],
)
def test_the_period_of_the_evaluation_is_that_of_the_user(arguments, added):
    options = build_parser().parse_args(TUNE)
    search, _ = plan(options, [*arguments, "optim.lr=0.1,0.2"])
    assert search.arguments == [*arguments, *added]


def test_equal_values_are_one_run():
    _, trials = plan(build_parser().parse_args(TUNE), ["optim.lr=0.1,0.1", "seed=1,2"])
    assert [trial.overrides[1] for trial in trials] == ["seed=1", "seed=2"]


def test_a_folder_that_is_a_file_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").write_text("")
    monkeypatch.chdir(tmp_path)
    assert main([*TUNE, *DIGITS, "optim.lr=0.1,0.2"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("distrain.tune: ")
    assert "'runs/s'" in line


def test_swept_values():
    assert swept_values(["-m", "+experiment=x", "a=1,2", "b=[1,2]", "+c=range(2)"]) == (
        ["-m", "+experiment=x", "b=[1,2]"],
        [["a=1", "a=2"], ["+c=0", "+c=1"]],
    )


def test_an_unknown_scalar_is_named(tmp_path):
    Path(tmp_path / "metrics.jsonl").write_text('{"iteration": 3, "eval/accuracy": "NaN"}\n{"iter')
    assert objective(tmp_path, "eval/accuracy", mode="max") is None
    with pytest.raises(
        ConfigError, match=r"eval/acuracy: no such scalar in .*; did you mean eval/acc"
    ):
        objective(tmp_path, "eval/acuracy", mode="max")

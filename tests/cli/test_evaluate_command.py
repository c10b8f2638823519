"""`python -m distrain.evaluate` on a run of the digits."""

import json
import os
import subprocess
import sys

import pytest
from run_module import run_module

from distrain.cli.evaluate import changed
from distrain.config.instantiate import build
from distrain.errors import ConfigError
from distrain.job.load import load, read_conf, refuse_masked

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*arguments, module="distrain.evaluate"):
    return run_module(module, *map(str, arguments), env=ENV)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 40 iterations on two ranks."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    arguments = ["+experiment=digits", "launch.ranks=2", "trainer.max_iter=40", f"run.dir={folder}"]
    done = command(*arguments, "hooks.checkpoint.period=20", module="distrain")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.ranks
def test_it_gives_the_value_of_training_and_the_predictions(run, tmp_path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (trained,) = [row["eval/accuracy"] for row in rows if "eval/accuracy" in row][-1:]
    files = {path.relative_to(run): path.read_bytes() for path in run.glob("*") if path.is_file()}
    out = tmp_path / "digits.jsonl"
    done = command(run, "launch.ranks=3", "--predict", out)
    assert done.returncode == 0, done.stderr
    (result,) = run.glob("evaluations/*/metrics.json")
    found = json.loads(result.read_text())["metrics"]["accuracy"]
    assert found == trained, "the value of training, on another number of ranks"
    assert f"accuracy             {found:.6g}" in done.stdout
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(359))
    assert all(len(line["probabilities"]) == 10 for line in lines)
    for path, before in files.items():
        assert (run / path).read_bytes() == before, "an evaluation changes nothing of the run"


FORKS = """
import sys
from distrain.errors import ExitCode
from distrain.launch.local import LocalLauncher

def show(self, job, grant, stop):
    print(self.with_start_method().start_method)
    return ExitCode.FINISHED

LocalLauncher._run = show
from distrain.cli.evaluate import main
sys.exit(main())
"""


def test_its_ranks_are_forked_and_do_not_import_torch_again(run):
    command = [sys.executable, "-c", FORKS, str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENV)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "fork"


@pytest.mark.parametrize("choice", ["local", "slurm"])
def test_another_launcher_has_the_options_that_launchers_share(run, choice):
    _, conf = changed(read_conf(run), [f"launch={choice}", "launch.ranks=1", "launch.grace_s=7"])
    assert type(build(conf["launch"], "launch")).__name__.lower() == f"{choice}launcher"
    assert conf["launch"]["grace_s"] == 7


def test_a_masked_secret_is_not_taken_for_its_value(run):
    conf = read_conf(run)
    conf["data"]["eval"]["api_key"] = "***"
    refuse_masked(conf, ["model"])
    with pytest.raises(ConfigError, match=r"data.eval.api_key=\*\*\*: run.yaml does not hold this"):
        refuse_masked(conf, ["model", "data.eval"])
    conf["data"]["eval"] = {"url": "s3://***@host/x"}
    with pytest.raises(ConfigError, match="data.eval.url="):
        refuse_masked(conf, ["data.eval"])


def test_loading_a_model_with_a_masked_secret_names_a_way_that_works(run, monkeypatch):
    conf = read_conf(run)
    conf["model"]["hf_token"] = "***"
    monkeypatch.setattr("distrain.job.load.read_conf", lambda run: conf)
    with pytest.raises(ConfigError, match=r"hf_token=.*; build the model yourself, and give it"):
        load(run)


def test_the_place_of_the_launcher_does_not_matter(run):
    _, conf = changed(read_conf(run), ["launch.ranks=1", "launch=local"])
    assert conf["launch"]["ranks"] == 1


def test_values_are_those_of_training(run):
    overrides = ["vars.a=no", "+vars.b=1:30", "vars.c=1e-3", "++vars.d=[a, 1]", "vars.e=null"]
    _, conf = changed(read_conf(run), [*overrides, "vars.f='x, y'", "vars.g=größe"])
    expected = {"a": "no", "b": "1:30", "c": 1e-3, "d": ["a", 1], "e": None, "f": "x, y"}
    assert conf["vars"] == {**expected, "g": "größe"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["checkpoint=7"], "checkpoint=7: not in "),
        (["checkpoint=best:eval/f1"], "checkpoint=best:eval/f1: available: best:eval/accuracy"),
        (["data.evil.split=test"], "data.evil: no such key; did you mean eval"),
        (["launch=moon"], "launch=moon: no such choice; available: allocation, external, local"),
        (["launch"], "launch: expected KEY=VALUE"),
        (["--predict", "a.csv"], "--predict=a.csv: expected a file name that ends with .jsonl"),
        (["data.eval=null"], "data.eval: expected a value"),
        (["data.eval.split=${oc.env:NO_SUCH}"], "data.eval.split: KeyError raised while resolving"),
        (["data.eval.split=[a"], "cannot read 'data.eval.split=[a': "),
        (["data.eval.split=test,train"], "data.eval.split=test,train: expected one value"),
        (["=3"], "=3: expected KEY=VALUE"),
    ],
)
def test_a_mistake_is_one_line(run, arguments, text):
    done = command(run, *arguments, "launch.ranks=1")  # options and keys in any order
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("distrain.evaluate: "), done.stderr
    assert text in last

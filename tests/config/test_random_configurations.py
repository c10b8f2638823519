"""Whatever a command line says: a run that works, or one line and exit code 2. Nothing else."""

import contextlib
import io
import os
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from project import write_project

from distrain.cli.command import Command

TINY = """
import torch

class Points(torch.utils.data.Dataset):
    def __len__(self):
        return 16
    def __getitem__(self, i):
        return torch.tensor([float(i)]), torch.tensor([1.0])

class Fit(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(1, 1)
    def forward(self, x, y):
        return torch.nn.functional.l1_loss(self.line(x / 16), y)
"""
CONF = """
# @package _global_
run: {name: tiny}
model: {_target_: tiny_points.Fit}
data: {batch_size: 4, train: {_target_: tiny_points.Points}}
optim: {lr: 0.01}
trainer: {max_iter: 2}
launch: {in_process: true}
"""
# An override may ask for many processes or endless work, and get it; these numbers ask for little.
numbers = st.one_of(
    st.integers(-3, 3), st.sampled_from(["1e400", "-1e400", "nan", "1e-9", "2.5", 10**400, 2**63])
)
words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=8)
values = st.one_of(
    numbers.map(str),
    st.sampled_from(["null", "true", "[]", "{}", "[1,2]", "{a: 1}", "???", "${seed}", "${no}", ""]),
    words,
)


def keys() -> list[str]:
    """Return the keys that the service reads, and those of its groups."""
    root = Path(__file__).parents[2] / "conf"
    found = []
    for name, prefix in (
        ("config.yaml", ""),
        ("trainer/default.yaml", "trainer."),
        ("optim/sgd.yaml", "optim."),
        ("schedule/cosine.yaml", "schedule."),
        ("hooks/default.yaml", "hooks."),
        ("launch/local.yaml", "launch."),
    ):
        pending = [(prefix, OmegaConf.to_container(OmegaConf.load(root / name)))]
        for where, node in pending:
            for key, value in node.items():
                found.append(f"{where}{key}")
                if isinstance(value, dict):
                    pending.append((f"{where}{key}.", value))
    return sorted(k for k in found if k.split(".")[0] not in ("hydra", "defaults"))


overrides = st.builds(
    lambda sign, key, value: f"{sign}{key}={value}",
    st.sampled_from(["", "", "", "+", "++"]),
    st.one_of(st.sampled_from(keys()), words),
    values,
).filter(lambda text: not text.startswith("-"))  # a flag: argparse's own


@pytest.fixture
def project(tmp_path, monkeypatch):
    write_project(tmp_path, module="tiny_points", code=TINY, experiment="tiny", conf=CONF)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("tiny_points", None)


@settings(
    max_examples=200,
    phases=[Phase.explicit, Phase.generate],  # each example is quick to read as it is
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(given_overrides=st.lists(overrides, min_size=1, max_size=3))
@example(["trainer.max_iter=" + "9" * 400])
@example(["optim.lr=" + "9" * 400])
@example([])
def test_a_command_works_or_says_why_in_a_line(project, monkeypatch, given_overrides):
    argv = ["--config-dir", str(project / "conf"), "+experiment=tiny", *given_overrides]
    monkeypatch.setattr("sys.argv", ["distrain", *argv])
    before = sorted(os.listdir(project))
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = Command(argv).run()
    said = errors.getvalue()
    assert "Traceback" not in said
    assert code in (0, 2), said
    if code == 2:
        assert said.startswith("distrain: ")
        assert said.count("\n") == 1, said
        assert sorted(os.listdir(project)) == before
    for name in set(os.listdir(project)) - {"conf", "tiny_points.py", "__pycache__"}:
        shutil.rmtree(project / name)

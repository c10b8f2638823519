"""Several sets and metrics over each, by command: trained, evaluated, predicted."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from project import write_project
from safetensors.torch import load_file
from torchmetrics.classification import MulticlassAUROC

from distrain.cli.command import Command
from distrain.cli.evaluate import main
from distrain.errors import ExitCode
from distrain.job.job import TrainJob
from distrain.job.load import read_conf

ROOT = Path(__file__).parents[2]
SIZES = {"clean": 103, "noisy": 50}

CODE = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy


class Photos(torch.utils.data.Dataset):
    def __init__(self, folder):
        size = {"/data/train": 256, "/data/clean": 103, "/data/noisy": 50}[folder]
        generator = torch.Generator().manual_seed(size)
        self.images = torch.randn(size, 4, generator=generator)
        self.labels = torch.randint(3, (size,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)

    def logits(self, images):
        return self.head(images)

    def forward(self, images, labels):
        return cross_entropy(self.logits(images), labels)

    def predict(self, images, labels):
        return {"preds": self.logits(images).softmax(1), "target": labels}


def errors(preds, target):
    return (preds.argmax(1) != target).sum()
"""
CONF = """
model: {_target_: my_project.Model}
trainer: {max_iter: 20, window: 5}
launch: {in_process: true}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A project with the example of docs/evaluation.md, trained in this process."""
    folder = tmp_path_factory.mktemp("project")
    page = (ROOT / "docs" / "evaluation.md").read_text()
    (example,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.M | re.S)
    assert example.count("\n") <= 25
    example = example.replace("clean: 100, noisy: 1000", "clean: 10, noisy: 1000")
    conf = "# @package _global_\n" + example + CONF
    write_project(folder, module="my_project", code=CODE, experiment="mine", conf=conf)
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.syspath_prepend(str(folder))
    patch.setattr(sys, "argv", ["distrain", "--config-dir", "conf", "+experiment=mine"])
    try:
        assert Command(sys.argv[1:]).run() is ExitCode.FINISHED
        yield folder
    finally:
        patch.undo()
        sys.modules.pop("my_project", None)


def test_it_gives_the_values_of_training_and_those_of_torchmetrics(folder, capfd):
    lines = (folder / "runs" / "mine" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert main(["runs/mine"]) == 0
    (file,) = (folder / "runs" / "mine").glob("evaluations/*/metrics.json")
    found = json.loads(file.read_text())["metrics"]
    assert found.keys() == {f"{s}/{n}" for s in SIZES for n in ("loss", "auroc", "errors")}
    last = {name: value for name, value in rows[-1].items() if name.startswith("eval/")}
    assert {f"eval/{name}": value for name, value in found.items()} == last
    names = [{name.rpartition("/")[0] for name in row if "eval/" in name} for row in rows]
    assert names == [set(), {"eval/clean"}, set(), {"eval/clean", "eval/noisy"}]
    best = (folder / "runs" / "mine" / "checkpoints" / "best.json").read_text()
    assert "eval/clean/auroc" in best

    capfd.readouterr()
    assert main(["runs/mine", "--set", "noisy", "--predict", "noisy.safetensors"]) == 0
    shown = capfd.readouterr().out
    assert "noisy/auroc" in shown
    assert "clean" not in shown
    predictions = load_file("noisy.safetensors")
    generator = torch.Generator().manual_seed(SIZES["noisy"])
    torch.randn(SIZES["noisy"], 4, generator=generator)
    labels = torch.randint(3, (SIZES["noisy"],), generator=generator)
    assert torch.equal(predictions["target"], labels), "each sample once, in order"
    auroc = MulticlassAUROC(num_classes=3)(predictions["preds"], predictions["target"])
    assert found["noisy/auroc"] == float(auroc)


def test_the_plan_shows_the_sets_and_metrics(folder):
    text = TrainJob(read_conf("runs/mine"), "runs/new").plan()
    sets = "clean: my_project.Photos, noisy: my_project.Photos; over each set: auroc, errors"
    assert f"evaluation  {sets}\n" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--set", "nosy"], "--set=nosy: expected the name of a set in data.eval; did you mean no"),
        (["--predict", "a.jsonl"], "--predict: expected one data set; add --set clean or --set no"),
        (["eval.metrics.errors=my_project.error"], "eval.metrics.errors=my_project.error: my_proj"),
        (
            ["eval.metrics.auroc.num_class=3"],
            "eval.metrics.auroc: Unexpected keyword arguments: `num_",
        ),
        (["eval.metric.f1=my_project.errors"], "eval.metric: no such key; did you mean metrics?"),
    ],
)
def test_mistakes_of_the_command(folder, arguments, text, capfd):
    assert main(["runs/mine", *arguments]) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"distrain.evaluate: {text}")

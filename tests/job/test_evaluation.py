"""Evaluation without training: each sample once, in order, on any number of ranks."""

import json
import random

import numpy as np
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from torch import nn

import distrain
from distrain.checkpoint.store import CheckpointStore
from distrain.data.loader import EvalLoader
from distrain.distributed.ranks import topology
from distrain.distributed.rng import seed_everything
from distrain.errors import ConfigError
from distrain.job.load import find_checkpoint
from distrain.job.predictions import check_output, write_predictions
from distrain.trainer.evaluate import evaluate

SIZE = 1003
CPU = torch.device("cpu")


class Numbers(torch.utils.data.Dataset):
    def __init__(self, size):
        self.values = torch.arange(size, dtype=torch.float32)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


class Doubles(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return (self.factor * x).mean()

    def metrics(self, x):
        return {"value": x}

    def predict(self, x):
        return {"double": self.factor * x, "pair": torch.stack([x, -x], dim=1)}


def predicted(rank, path, size):
    where = topology()
    loader = EvalLoader(Numbers(size), batch_size=64, rank=rank, world_size=where.world_size)
    write_predictions(Doubles(), loader, str(path), device=CPU)
    return evaluate(Doubles(), loader, device=CPU)


@pytest.mark.ranks
@pytest.mark.parametrize(("world_size", "size"), [(1, SIZE), (4, SIZE), (4, 2)])
def test_each_sample_once_and_in_order(tmp_path, world_size, size):
    results = run_ranks(predicted, world_size, tmp_path / "p.safetensors", size)
    found = load_file(tmp_path / "p.safetensors")
    expected = torch.arange(size, dtype=torch.float32)
    assert torch.equal(found["double"], 2 * expected)
    assert torch.equal(found["pair"], torch.stack([expected, -expected], 1))
    assert all(result == {"value": (size - 1) / 2} for result in results)
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_lines(tmp_path):
    run_ranks(predicted, 2, tmp_path / "p.jsonl", 3)
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert lines == [
        {"index": 0, "double": 0.0, "pair": [0.0, -0.0]},
        {"index": 1, "double": 2.0, "pair": [1.0, -1.0]},
        {"index": 2, "double": 4.0, "pair": [2.0, -2.0]},
    ]


def odd_ones(samples):
    return torch.stack([sample for sample in samples if sample % 2])


def predicted_odd_ones(rank, path):
    where = {"rank": rank, "world_size": topology().world_size}
    loader = EvalLoader(Numbers(8), batch_size=2, collate=odd_ones, **where)
    write_predictions(Doubles(), loader, str(path), device=CPU)


@pytest.mark.ranks
def test_lines_of_samples_that_collate_left_out_have_no_wrong_index(tmp_path, caplog):
    predicted_odd_ones(0, tmp_path / "p.safetensors")
    assert "4 predictions for 8 samples, as data.collate leaves samples out" in caplog.text
    run_ranks(predicted_odd_ones, 2, tmp_path / "p.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["double"] for line in lines] == [2, 6, 10, 14]
    assert not any("index" in line for line in lines)


class Mean(Doubles):
    def predict(self, x):
        return x.mean()


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Linear(1, 1), "Linear has no method predict"),
        (Mean(), r"'prediction': \[\]; expected \[3, ...\]"),
    ],
)
def test_mistakes_of_a_model(tmp_path, model, text):
    loader = EvalLoader(Numbers(3), batch_size=64)
    with pytest.raises(ConfigError, match=text):
        write_predictions(model, loader, str(tmp_path / "p.jsonl"), device=CPU)
    assert not (tmp_path / "p.jsonl").exists()


def test_the_output_is_of_a_known_kind():
    with pytest.raises(ConfigError, match=r"--predict=p.csv: expected a file name that ends with"):
        check_output("p.csv")


def test_the_output_can_be_written(tmp_path):
    check_output(str(tmp_path / "p.jsonl"))
    (tmp_path / "a.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"--predict=.*: expected a file; it is a folder"):
        check_output(str(tmp_path / "a.jsonl"))
    with pytest.raises(ConfigError, match=r"a folder that can be written, not .*/missing$"):
        check_output(str(tmp_path / "missing" / "p.jsonl"))


RUN = """
run: {name: a, dir: runs/a}
seed: 0
model: {_target_: torch.nn.Linear, in_features: 2, out_features: 1}
data: {batch_size: 2, train: {_target_: my.Data}}
trainer: {max_iter: 9}
optim: {target: torch.optim.SGD, lr: 0.1}
launch: {_target_: distrain.launch.local.LocalLauncher}
hooks: {}
"""


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints at 3, 6 and 9, of which 6 is the best by two metrics."""
    (tmp_path / "run.yaml").write_text(RUN)
    store = CheckpointStore(tmp_path / "checkpoints")
    for iteration in (3, 6, 9):
        weights = {"weight": torch.full((1, 2), float(iteration)), "bias": torch.zeros(1)}
        hooks = {"ema": {"average": {name: w + 0.5 for name, w in weights.items()}}}
        best = {"eval/a": 1.0, "eval/b": 2.0} if iteration == 6 else {}
        store.save(iteration, {"model": weights, "hooks": hooks}, world_size=1, best=best)
        assert store.wait()
    store.close()
    return tmp_path


def test_load_returns_the_model_of_a_checkpoint(run):
    model = distrain.load(run)
    assert not model.training
    assert model.weight.tolist() == [[9, 9]]
    assert distrain.load(run, checkpoint=3).weight.tolist() == [[3, 3]]
    assert distrain.load(run, checkpoint="best:eval/b").weight.tolist() == [[6, 6]]
    assert distrain.load(run, ema="ema").weight.tolist() == [[9.5, 9.5]]


class Worded(nn.Linear):
    """A module with state that is no tensor, and with a version of its state."""

    _version = 7

    def get_extra_state(self):
        return {"words": self.words}

    def set_extra_state(self, state):
        self.words = state["words"]

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        assert local_metadata["version"] == 7
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_load_restores_state_that_is_no_tensor(run):
    text = (run / "run.yaml").read_text()
    path = f"{Worded.__module__}.{Worded.__name__}"
    (run / "run.yaml").write_text(text.replace("torch.nn.Linear", path))
    model = Worded(2, 1)
    model.words = ["a", "b"]
    average = {"weight": torch.zeros(1, 2)}
    store = CheckpointStore(run / "checkpoints")
    state = {"model": model.state_dict(), "hooks": {"ema": {"average": average}}}
    store.save(12, state, world_size=1)
    store.close()
    assert distrain.load(run).words == ["a", "b"]
    loaded = distrain.load(run, ema="ema")
    assert (loaded.words, loaded.weight.tolist()) == (["a", "b"], [[0, 0]])


def test_load_leaves_the_random_generators_alone(run):
    seed_everything(5, rank=0)
    numbers = random.random(), np.random.rand(), torch.rand(1)
    seed_everything(5, rank=0)
    distrain.load(run)
    assert (random.random(), np.random.rand(), torch.rand(1)) == numbers


@pytest.mark.parametrize(
    ("which", "text"),
    [
        ("best", "available: best:eval/a, best:eval/b"),
        ("best:eval/c", "available: best:eval/a"),
        (4, "checkpoint=4: not in .*; available: 3, 6, 9"),
        ("last", "checkpoint=last: expected newest, best, best:METRIC or an iteration"),
    ],
)
def test_checkpoints_that_do_not_exist(run, which, text):
    with pytest.raises(ConfigError, match=text):
        find_checkpoint(run, which)


def test_a_damaged_checkpoint_is_refused_or_passed_over(run):
    path = find_checkpoint(run, 9).path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ConfigError, match="checkpoint=9: damaged"):
        find_checkpoint(run, 9)
    assert find_checkpoint(run, "newest").iteration == 6


def test_weights_that_do_not_fit(run):
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(text.replace("in_features: 2", "in_features: 3"))
    with pytest.raises(ConfigError, match="does not fit the model: size mismatch for weight"):
        distrain.load(run)
    with pytest.raises(ConfigError, match="expected the folder of a run"):
        distrain.load(run / "checkpoints")


def test_one_tensor_is_named_prediction(tmp_path):
    class One(Doubles):
        def predict(self, x):
            return x

    write_predictions(
        One(), EvalLoader(Numbers(3), batch_size=2), str(tmp_path / "p.jsonl"), device=CPU
    )
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["prediction"] for line in lines] == [0, 1, 2]


class Boxes(Doubles):
    """Returns a list of boxes per sample, as many as its value."""

    def predict(self, x):
        return {"boxes": [torch.full((int(value), 2), value.item()) for value in x], "sum": x}


class Pair(Doubles):
    def predict(self, x):
        return 2 * x, x.long()


def written(rank, path, model):
    loader = EvalLoader(Numbers(5), batch_size=2, rank=rank, world_size=topology().world_size)
    write_predictions(model, loader, str(path), device=CPU)


@pytest.mark.ranks
def test_lists_of_unequal_size_are_lines(tmp_path):
    run_ranks(written, 3, tmp_path / "p.jsonl", Boxes())
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert lines == [{"index": i, "boxes": [[float(i)] * 2] * i, "sum": float(i)} for i in range(5)]
    with pytest.raises(ConfigError, match="'boxes' is a list, or differs in shape between samples"):
        written(0, tmp_path / "p.safetensors", Boxes())
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]


def test_a_pair_is_named_preds_and_target(tmp_path):
    written(0, tmp_path / "p.safetensors", Pair())
    found = load_file(tmp_path / "p.safetensors")
    assert found["preds"].tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]
    assert found["target"].tolist() == [0, 1, 2, 3, 4]

"""A transform and a loader of the user, chosen by the configuration: those of examples/."""

import numpy as np
import pytest
import torch
from torch import nn

from distrain.checkpoint.store import CheckpointStore
from distrain.config.check_keys import check
from distrain.data import Loader
from distrain.distributed.ranks import Topology
from distrain.distributed.strategy import Strategy
from distrain.errors import ConfigError, ExitCode
from distrain.job.build import build_parts
from distrain.job.model import build_model
from distrain.job.plan import plan
from distrain.job.training import train
from examples.token_shards import TokenShards


class Lines(torch.utils.data.Dataset):
    """Points of a line; a sample is (x (1,), y (1,))."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.tensor([index / 16]), torch.tensor([index / 8])


class Fit(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 4), nn.Tanh())
        self.head = nn.Linear(4, 1)

    def forward(self, x, y):
        return nn.functional.mse_loss(self.head(self.body(x)), y)


class Bigram(nn.Module):
    """Next token from the token; remembers which windows it has seen."""

    seen: list = []

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(32, 32)

    def forward(self, windows):
        self.seen.append(windows[:, 0].tolist())
        return nn.functional.cross_entropy(
            self.table(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()
        )


def conf_of(**keys):
    here = {"_target_": f"{__name__}.Lines"}
    conf = {
        "run": {"name": "x", "dir": "x"},
        "data": {"batch_size": 4, "train": here},
        "trainer": {"max_iter": 4, "window": 1},
        "model": {"_target_": f"{__name__}.Fit"},
        "optim": {"lr": 0.1},
        "launch": {"_target_": "x.Y"},
        "hooks": {
            "checkpoint": {"_target_": "distrain.hooks.PeriodicCheckpointer", "period": None}
        },
    }
    return check(conf | keys)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    for name, value in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)):
        monkeypatch.setenv(name, str(value))


def trained(conf, run_dir):
    """Train, and return the weights at the end."""
    run_dir.mkdir(exist_ok=True)
    assert train(conf, str(run_dir)) == ExitCode.FINISHED
    return CheckpointStore(run_dir / "checkpoints").load(conf["trainer"]["max_iter"])["model"]


LORA = {"_target_": "examples.lora.add_adapters", "match": "body.*", "rank": 2}


def test_an_adapter_is_trained_on_top_of_given_weights_and_resumes(tmp_path):
    given = {name: torch.full_like(p, 0.25) for name, p in Fit().state_dict().items()}
    torch.save(given, tmp_path / "given.pt")
    keys = {"transforms": {"off": None, "lora": LORA}}
    conf = conf_of(init={"weights": str(tmp_path / "given.pt")}, **keys)
    weights = trained(conf, tmp_path / "run")
    assert torch.equal(weights["body.0.linear.weight"], given["body.0.weight"])
    assert torch.equal(weights["head.weight"], given["head.weight"])
    assert weights["body.0.up"].abs().sum() > 0
    # a resumed run has its own weights: the file is not read again
    (tmp_path / "given.pt").unlink()
    longer = conf_of(
        init=conf["init"], trainer={"max_iter": 6, "window": 1}, transforms=keys["transforms"]
    )
    assert not torch.equal(trained(longer, tmp_path / "run")["body.0.up"], weights["body.0.up"])


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({**LORA, "match": "tail.*"}, "transforms.lora.match=tail.*: expected a pattern of body.0"),
        ({**LORA, "rnk": 2}, "transforms.lora.rnk: add_adapters has no such keyword; did you mean"),
        (
            {"_target_": "builtins.len", "_args_": [[]]},
            "transforms.lora._target_=builtins.len: expected a torch.nn.Module; it returned int",
        ),
    ],
)
def test_mistakes_in_a_transform(node, message):
    conf = conf_of(transforms={"lora": node})
    with pytest.raises(ConfigError) as caught:
        build_model(conf, ranks=Topology(), strategy=Strategy(), is_new=True)
    assert str(caught.value).startswith(message)


@pytest.fixture
def shards(tmp_path):
    """Two files with 3 and 4 windows of 4 tokens, numbered from 0 on."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    np.save(folder / "a.npy", np.arange(13, dtype=np.uint16))
    np.save(folder / "b.npy", np.arange(13, 30, dtype=np.uint16))
    return {"_target_": "examples.token_shards.TokenShards", "files": str(folder), "context": 4}


def stream_of(shards, **keys):
    data = {"batch_size": 2, "train": None, "loader": shards}
    return conf_of(data=data, model={"_target_": f"{__name__}.Bigram"}, **keys)


def test_a_loader_of_the_user_trains_and_resumes_bit_for_bit(shards, tmp_path):
    whole = trained(stream_of(shards), tmp_path / "whole")
    assert Bigram.seen[:4] == [[0, 4], [8, 13], [17, 21], [25, 0]]
    short = stream_of(shards, trainer={"max_iter": 2, "window": 1})
    trained(short, tmp_path / "parts")
    resumed = trained(stream_of(shards), tmp_path / "parts")
    assert torch.equal(resumed["table.weight"], whole["table.weight"])
    assert "7 samples, 2 per step over all ranks" in plan(stream_of(shards), str(tmp_path / "new"))


def test_the_windows_of_all_ranks_are_those_of_one(shards):
    def first_tokens(world_size, accumulation):
        keys = {k: v for k, v in shards.items() if k != "_target_"}
        parts = []
        for rank in range(world_size):
            loader = TokenShards(
                **keys, batch_size=4, rank=rank, world_size=world_size, accumulation=accumulation
            )
            parts.append(loader.batches(1))
        forwards = [[next(part) for part in parts] for _ in range(accumulation)]
        return torch.cat([torch.cat(ranks) for ranks in forwards])[:, 0].tolist()

    assert first_tokens(1, 1) == first_tokens(2, 1) == first_tokens(2, 2) == [17, 21, 25, 0]


def collate_in_reverse(samples):
    return [torch.stack(part) for part in zip(*reversed(samples), strict=True)]


def parts_of(conf, tmp_path):
    model = build_model(conf, ranks=Topology(), strategy=Strategy(), is_new=True)
    store = CheckpointStore(tmp_path / "checkpoints")
    return build_parts(
        conf,
        model=model,
        strategy=Strategy(),
        ranks=Topology(),
        run_dir=str(tmp_path),
        checkpoints=store,
    )


def test_a_collate_function_and_the_keys_of_the_default_loader(tmp_path):
    data = {
        "batch_size": 4,
        "train": {"_target_": f"{__name__}.Lines"},
        "collate": f"{__name__}.collate_in_reverse",
        "loader": {"_target_": "distrain.data.TrainLoader", "shuffle": False},
    }
    loader = parts_of(conf_of(data=data), tmp_path).loader
    assert isinstance(loader, Loader)
    x, _ = next(loader.batches(0))
    assert (x * 16).flatten().tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": None}, "data.train: expected a value"),
        (
            {"loader": {"_target_": f"{__name__}.Fit"}},
            f"data.loader._target_={__name__}.Fit: expected a loader with a method batches",
        ),
        ({"collate": "torch.colate"}, "data.collate=torch.colate: torch has no colate"),
    ],
)
def test_mistakes_in_the_data(data, message, tmp_path):
    data = {"batch_size": 4, "train": {"_target_": f"{__name__}.Lines"}} | data
    with pytest.raises(ConfigError) as caught:
        parts_of(conf_of(data=data), tmp_path)
    assert str(caught.value).startswith(message)

"""Layer-wise decay by one key, against numbers worked out by hand."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from distrain.errors import ConfigError
from distrain.optim.groups import explain_groups, format_groups, param_groups
from distrain.optim.layer_decay import find_layers
from distrain.optim.optimizer import build_optimizer


class Vit(nn.Module):
    """A token at the root, an embedding, blocks that hold numbered modules, a norm, a head."""

    def __init__(self, depth=3):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(8, 4)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)


def rates(model, **keywords):
    rows = explain_groups(model, **{"lr": 1.6, "weight_decay": 0.0, **keywords})
    return {row.name: row.lr for row in rows}


def test_a_vision_transformer_by_hand():
    got = rates(Vit(), layer_decay=0.5)
    assert got["token"] == got["embed.weight"] == got["embed.bias"] == 0.1  # 1.6 * 0.5 ** 4
    assert got["blocks.0.0.weight"] == got["blocks.0.2.bias"] == 0.2
    assert got["blocks.1.1.weight"] == 0.4
    assert got["blocks.2.1.weight"] == 0.8
    assert got["norm.weight"] == got["head.weight"] == got["head.bias"] == 1.6


def test_a_sequential_model_by_hand():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert rates(model, layer_decay=0.5) == {
        "0.weight": 0.4, "0.bias": 0.4, "2.weight": 0.8, "2.bias": 0.8,
    }  # fmt: skip
    # two layers and nothing behind them: depths 1 and 2 of 3; all of it may be said by lr instead


def test_the_table_says_where_each_fell_and_why():
    rows = explain_groups(Vit(), lr=1.6, weight_decay=0.0, layer_decay=0.5)
    why = {row.name: (row.group, row.why) for row in rows}["blocks.1.1.weight"]
    assert why == ("layer.2", "weight; rule layer: layer_decay=0.5 ** 2 (depth 2 of 4)")
    text = format_groups(rows)
    assert [line.split()[0] for line in text.splitlines()[1:6]] == [f"layer.{d}" for d in range(5)]


def test_rules_of_the_user_and_decays_stay():
    rules = {"head": {"match": "head.*", "lr_factor": 10}}
    got = rates(Vit(), layer_decay=0.5, rules=rules, bias_lr_factor=2.0)
    assert got["head.weight"] == 16.0
    assert got["blocks.2.1.bias"] == 1.6
    groups = param_groups(Vit(), lr=1, weight_decay=0.1, weight_decay_norm=0.0, layer_decay=0.5)
    decays = {group["name"]: group["weight_decay"] for group in groups}
    assert (decays["layer.1"], decays["layer.1/norm"]) == (0.1, 0.0)
    listed = rates(Vit(), layer_decay=0.5, rules=[{"match": "head.*", "lr": 0.3}])
    assert (listed["head.weight"], listed["norm.bias"]) == (0.3, 1.6)


def test_the_optimizer_takes_it_and_the_user_may_name_the_layers():
    optimizer = build_optimizer(Vit(), lr=1.6, layer_decay=0.5, layers="blocks.{}.*")
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2, 0.4, 0.8, 1.6]
    stages = nn.ModuleList(nn.ModuleList(nn.Linear(1, 1) for _ in range(2)) for _ in range(2))
    got = rates(stages, lr=16, layer_decay=0.5, layers="{}.{}.*")
    assert [got[f"{i}.{j}.bias"] for i in (0, 1) for j in (0, 1)] == [1, 2, 4, 8]


def named(*names, numel=4):
    return {name: nn.Parameter(torch.zeros(numel)) for name in names}


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["conv1.weight", "layer1.0.conv1.weight", "layer2.0.conv1.weight", "layer2.1.bn1.bias",
          "fc.weight"], "layer{}.*"),
        (["encoder.layers.encoder_layer_0.w", "encoder.layers.encoder_layer_1.w", "head.w"],
         "encoder.layers.encoder_layer_{}.*"),
        (["layers.0.blocks.0.w", "layers.0.blocks.1.w", "layers.1.blocks.0.w"], "layers.{}.*"),
        (["0.w", "1.0.w", "1.1.w", "2.w"], "{}.*"),
    ],
)  # fmt: skip
def test_layers_are_found_by_their_numbers(names, pattern):
    assert find_layers(named(*names), 0.5) == pattern


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"layer_decay": 0}, "layer_decay=0: expected a finite number"),
        ({"layer_decay": 0.5, "layers": "block.{}.*"}, "layers=block.{}.\\*: .*did you mean"),
        ({"layers": "blocks.{}.*"}, "layers=blocks.{}.\\*: expected null without layer_decay"),
    ],
)  # fmt: skip
def test_mistakes(keywords, message):
    with pytest.raises(ConfigError, match=message):
        rates(Vit(), **keywords)


def test_a_model_without_layers_is_an_error_that_names_the_numbered_modules():
    two = OrderedDict(big=nn.Linear(9, 9), few=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(ConfigError, match=r"layer_decay=0.5: expected a model .*found: few.{}.\*"):
        rates(nn.Sequential(two), layer_decay=0.5)
    with pytest.raises(ConfigError, match=r"half of its weights; set optim.layers"):
        rates(nn.Linear(2, 2), layer_decay=0.5)

"""What the rules of a user match, what they set, and what a mistaken one says."""

import pytest
from group_cases import BASE, Vit
from torch import nn

from distrain.errors import ConfigError
from distrain.optim.groups import explain_groups, param_groups


def fell(model, **keywords):
    """Return {parameter: (group, lr, weight decay)}."""
    return {r.name: (r.group, r.lr, r.weight_decay) for r in explain_groups(model, **keywords)}


def test_rules_by_name_set_keys_and_the_rest_stays():
    rules = {"head": {"match": "head.*", "lr_factor": 10, "momentum": 0.8}}
    groups = {g["name"]: g for g in param_groups(Vit(), **BASE, rules=rules)}
    assert list(groups) == ["default", "bias", "norm", "head", "head/bias"]
    head, bias = groups["head"], groups["head/bias"]
    assert (head["lr"], head["weight_decay"], head["momentum"]) == (1.0, 1e-4, 0.8)
    assert (bias["lr"], bias["weight_decay"], bias["momentum"]) == (2.0, 5e-5, 0.8)
    assert "momentum" not in groups["default"]


def test_for_each_key_the_first_rule_that_matches_wins():
    rules = {
        "bias": {"match": "*.bias", "weight_decay": 0, "lr": 0.5},
        "head": {"match": ["head.*", "norm.*"], "weight_decay": 0.3, "lr_factor": 2},
    }
    got = fell(Vit(), **BASE, rules=rules)
    assert got["head.bias"] == ("bias", 0.5, 0.0)  # the second rule has nothing left to set
    assert got["head.weight"] == ("head", 0.2, 0.3)
    assert got["norm.weight"] == ("head", 0.2, 0.3)
    swapped = fell(Vit(), **BASE, rules=dict(reversed(rules.items())))
    assert swapped["head.bias"][1:] == (0.4, 0.3)
    assert swapped["embed.bias"][1:] == (0.5, 0.0)


def test_rules_by_class_mean_all_that_is_inside():
    rules = {"blocks": {"module": "torch.nn.Sequential", "weight_decay": 0.5}}
    changed = {n for n, (_, _, decay) in fell(Vit(), **BASE, rules=rules).items() if decay == 0.5}
    assert changed == {
        f"blocks.{i}.{j}.{k}" for i in "01" for j in "01" for k in ("weight", "bias")
    }
    narrow = {"blocks": {"module": "Sequential", "match": "*.0.1.*", "weight_decay": 0.5}}
    changed = {n for n, (_, _, decay) in fell(Vit(), **BASE, rules=narrow).items() if decay == 0.5}
    assert changed == {"blocks.0.1.weight", "blocks.0.1.bias"}


def test_layer_decay_by_hand():
    rules = {"depth": {"layers": "blocks.{}.*", "layer_decay": 0.5}}
    rows = {r.name: r for r in explain_groups(Vit(), lr=0.8, weight_decay=0, rules=rules)}
    lrs = {name: row.lr for name, row in rows.items()}
    assert lrs["token"] == lrs["embed.weight"] == lrs["embed.bias"] == 0.1  # 0.8 * 0.5 ** 3
    assert lrs["blocks.0.0.weight"] == lrs["blocks.0.1.bias"] == 0.2
    assert lrs["blocks.1.0.weight"] == 0.4
    assert lrs["norm.weight"] == lrs["head.bias"] == 0.8
    assert [g["name"] for g in param_groups(Vit(), lr=0.8, weight_decay=0, rules=rules)] == [
        "depth.0", "depth.1", "depth.2", "depth.3",
    ]  # fmt: skip
    why = "norm; rule depth: layer_decay=0.5 ** 2 (depth 1 of 3)"
    assert rows["blocks.0.0.weight"].why == why


def test_layer_decay_multiplies_with_other_rules_and_stays_inside_its_match():
    rules = {
        "depth": {"match": "blocks.*", "layers": "blocks.{}.*", "layer_decay": 0.5},
        "biases": {"match": "*.bias", "lr_factor": 3},
    }
    got = fell(Vit(), lr=0.8, weight_decay=0, rules=rules)
    assert got["blocks.0.1.bias"][:2] == ("depth.1+biases", pytest.approx(0.6))
    assert got["blocks.0.1.weight"][1] == 0.2
    assert got["head.weight"] == ("default", 0.8, 0)


def test_layers_are_ordered_by_number_and_frozen_ones_count():
    model = nn.ModuleDict({"b": nn.ModuleDict({str(i): nn.Linear(1, 1) for i in (10, 9, 2)})})
    rules = {"depth": {"layers": "b.{}.*", "layer_decay": 0.5}}
    lrs = {n: lr for n, (_, lr, _) in fell(model, lr=16, weight_decay=0, rules=rules).items()}
    assert (lrs["b.2.weight"], lrs["b.9.weight"], lrs["b.10.weight"]) == (2, 4, 8)
    model["b"]["2"].requires_grad_(False)
    assert fell(model, lr=16, weight_decay=0, rules=rules)["b.9.bias"][1] == 4
    stages = nn.ModuleList(nn.ModuleList(nn.Linear(1, 1) for _ in range(2)) for _ in range(2))
    rules = {"depth": {"layers": "{}.{}.*", "layer_decay": 0.5}}
    lrs = {n: lr for n, (_, lr, _) in fell(stages, lr=16, weight_decay=0, rules=rules).items()}
    assert [lrs[f"{i}.{j}.bias"] for i in (0, 1) for j in (0, 1)] == [1, 2, 4, 8]


def test_rules_as_a_list_and_switched_off():
    rules = [{"name": "head", "match": "head.*", "lr_factor": 2}, {"match": "embed.*", "lr": 1}]
    names = [g["name"] for g in param_groups(Vit(), lr=0.1, weight_decay=0, rules=rules)]
    assert names == ["default", "embed.*", "head"]
    off = {"head": None}
    assert len(param_groups(Vit(), lr=0.1, weight_decay=0, rules=off)) == 1


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"h": {"match": "haed.*", "lr": 1}},
            r"rules.h: matches no parameter: match=haed\.\* .*head",
        ),
        (
            {"h": {"module": "Linaer", "lr": 1}},
            r"rules.h: matches .*module=Linaer \(did you mean Linear",
        ),
        (
            {"h": {"module": "torch.nn.Nothing", "lr": 1}},
            "rules.h.module=torch.nn.Nothing: expected the import path",
        ),
        ({"h": {"match": "head.*"}}, "rules.h: sets nothing"),
        ({"h": {"lr": 1}}, "rules.h: no match condition"),
        (
            {"h": {"match": "*", "lr_factor": "10"}},
            "rules.h.lr_factor='10': expected a finite number",
        ),
        ({"h": {"match": "*", "lr_factor": -1}}, "rules.h.lr_factor=-1: expected a finite number"),
        ({"h": {"match": "*", "lr": 1, "lr_factor": 2}}, "both lr and lr_factor"),
        ({"h": {"match": "*", "params": 1}}, "rules.h: sets params"),
        ({"h": {"match": 3, "lr": 1}}, "rules.h.match=3"),
        ({"h": {"module": 3, "lr": 1}}, "rules.h.module=3"),
        ({"h": {"match": "*", "layer_decay": 0.5}}, "rules.h: expected layers"),
        ({"h": {"layers": "blocks.*", "layer_decay": 0.5}}, "rules.h: expected layers"),
        (
            {"h": {"layers": "block.{}.*", "layer_decay": 0.5}},
            "rules.h.layers=block.* expected a pattern .*did you mean blocks",
        ),
        ({"h": "head.*"}, "rules.h=head.*: expected a mapping"),
        ("head.*", "rules=head.*: expected a mapping"),
    ],
)
def test_mistakes_in_rules_name_rule_and_value(rules, message):
    with pytest.raises(ConfigError, match=message):
        param_groups(Vit(), **BASE, rules=rules)

"""Which parameter falls where: each trainable one once, with the settings that hold for it."""

import copy

import pytest
import torch
from group_cases import BASE, Vit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distrain.errors import ConfigError
from distrain.optim.groups import explain_groups, format_groups, param_groups


class AllNorms(nn.Module):
    """Every kind of norm layer once, and a convolution and a head that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm1d(4),
                nn.BatchNorm2d(4),
                nn.BatchNorm3d(4),
                nn.SyncBatchNorm(4),
                nn.LazyBatchNorm2d(),
                nn.GroupNorm(2, 4),
                nn.InstanceNorm1d(4, affine=True),
                nn.InstanceNorm2d(4, affine=True),
                nn.InstanceNorm3d(4, affine=True),
                nn.LayerNorm(4),
                nn.RMSNorm(4),
                nn.LocalResponseNorm(2),
            ]
        )
        self.head = nn.Linear(4, 2)


class Tied(nn.Module):
    """A table and an output layer that share their weight, and a module that occurs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.out = nn.Linear(4, 5)
        self.out.weight = self.table.weight


def fell(model, **keywords):
    """Return {parameter: (group, lr, weight decay)}."""
    return {r.name: (r.group, r.lr, r.weight_decay) for r in explain_groups(model, **keywords)}


def test_norm_layers_biases_and_the_rest():
    groups = {g["name"]: g for g in param_groups(AllNorms(), **BASE)}
    assert list(groups) == ["default", "bias", "norm"]
    assert [len(g["params"]) for g in groups.values()] == [
        2,
        2,
        21,
    ]  # RMSNorm has no bias, LRN none
    values = {name: (g["lr"], g["weight_decay"]) for name, g in groups.items()}
    assert values == {"default": (0.1, 1e-4), "bias": (0.2, 5e-5), "norm": (0.1, 0.0)}
    assert set(groups["norm"]) == {"name", "params", "lr", "weight_decay"}


def test_unset_decays_are_the_plain_one_and_equal_settings_share_a_group():
    (group,) = param_groups(AllNorms(), lr=0.1, weight_decay=0.01)
    assert (group["name"], len(group["params"]), group["weight_decay"]) == ("default", 25, 0.01)
    names = [g["name"] for g in param_groups(Vit(), lr=1, weight_decay=1, weight_decay_norm=0)]
    assert names == ["default", "norm"]
    both = param_groups(Vit(), lr=1, weight_decay=1, weight_decay_norm=0, weight_decay_bias=0)
    assert [g["name"] for g in both] == ["default", "bias+norm"]


def test_biases_by_other_names():
    model = nn.ModuleList([nn.MultiheadAttention(4, 2), nn.LSTM(4, 4)])
    bias = {name for name, (group, _, _) in fell(model, **BASE).items() if group == "bias"}
    attention = {"0.in_proj_bias", "0.out_proj.bias"}
    assert bias == attention | {"1.bias_ih_l0", "1.bias_hh_l0"}


def test_frozen_parameters_are_left_out_and_all_frozen_is_an_error():
    model = Vit()
    model.embed.requires_grad_(False)
    assert "embed.weight" not in fell(model, **BASE)
    assert len(fell(model, **BASE)) == 1 + 2 * 4 + 2 + 2
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="all are frozen"):
        param_groups(model, **BASE)


def test_shared_parameters_count_once_under_the_first_name():
    model = Tied()
    rows = explain_groups(model, **BASE)
    assert [r.name for r in rows] == ["table.weight", "first.weight", "first.bias", "out.bias"]
    assert rows[0].why == "weight; shared with out.weight"
    assert rows[1].why == "weight; shared with again.weight"
    params = [p for g in param_groups(model, **BASE) for p in g["params"]]
    assert {id(p) for p in params} == {id(p) for p in model.parameters()}
    assert len(params) == len(list(model.parameters())) == 4
    # a rule reaches a shared parameter by any of its names
    assert fell(model, **BASE, rules={"out": {"match": "out.*", "lr": 7}})["table.weight"][1] == 7


def test_a_parameter_at_the_root_has_its_plain_name():
    assert fell(Vit(), **BASE)["token"] == ("default", 0.1, 1e-4)


@pytest.mark.parametrize("rules", [(), {"bn": {"module": "BatchNorm2d", "lr_factor": 0.5}}])
def test_conversion_to_sync_batch_norm_changes_nothing(rules):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    before = explain_groups(model, **BASE, rules=rules)
    after = explain_groups(nn.SyncBatchNorm.convert_sync_batchnorm(model), **BASE, rules=rules)
    assert before == after
    assert {r.group for r in before} == {"default", "bias", "bn" if rules else "norm"}


class OwnBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Like our SyncBatchNorm: a class of its own under torch's base."""

    def _check_input_dim(self, input):
        return


def test_a_batch_norm_of_ones_own_is_a_norm_layer():
    rows = explain_groups(nn.Sequential(OwnBatchNorm(4)), **BASE)
    assert [(r.name, r.group) for r in rows] == [("0.weight", "norm"), ("0.bias", "norm")]


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone, which DDP needs."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_wrappers_leave_no_trace_in_names():
    plain = explain_groups(Vit(), **BASE, rules={"head": {"match": "head.*", "lr_factor": 3}})
    compiled = torch.compile(Vit())
    parts = Vit()
    parts.blocks[0] = torch.compile(parts.blocks[0])
    data_parallel = nn.DataParallel(torch.compile(Vit()))
    ddp = nn.parallel.DistributedDataParallel(torch.compile(Vit()))
    for model in (compiled, parts, data_parallel, ddp, torch.compile(ddp)):
        rules = {"head": {"match": "head.*", "lr_factor": 3}}
        assert explain_groups(model, **BASE, rules=rules) == plain


def test_a_module_of_the_user_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    assert list(fell(model, **BASE)) == ["module.weight", "module.bias"]


def test_lazy_parameters_have_no_shape_yet():
    rows = explain_groups(nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(2, 2)), **BASE)
    assert [(r.group, r.shape) for r in rows[:2]] == [("norm", None), ("norm", None)]
    assert "lazy" in format_groups(rows)


def test_group_names_are_unique_even_where_a_rule_is_called_norm():
    rules = {"norm": {"match": "head.weight", "lr_factor": 3}}
    names = [g["name"] for g in param_groups(Vit(), **BASE, rules=rules)]
    assert sorted(names) == ["bias", "default", "norm", "norm_2"]


@pytest.mark.parametrize("key", list(BASE))
@pytest.mark.parametrize("value", [True, "0.1", float("nan"), float("inf"), -1])
def test_settings_must_be_numbers_in_range(key, value):
    with pytest.raises(ConfigError, match=f"^{key}=.*: expected a finite number"):
        param_groups(Vit(), **{**BASE, key: value})


def test_the_table_has_a_line_for_each_group_and_each_parameter():
    model = nn.Sequential(*(nn.Conv2d(2, 2, 3, bias=False) for _ in range(160)), nn.Linear(2, 3))
    text = format_groups(explain_groups(model, **BASE))
    groups, listing = text.split("\n\n")
    assert groups.splitlines() == [
        "group    tensors  elements  lr   weight_decay",
        "default  161      5,766     0.1  0.0001",
        "bias     1        3         0.2  5e-05",
    ]
    lines = listing.splitlines()
    assert len(lines) == 1 + 162
    assert lines[1].split() == ["0.weight", "2x2x3x3", "default", "0.1", "0.0001", "weight"]
    assert len({line.index("default") for line in lines[1:162]}) == 1
    assert max(map(len, lines)) < 80


LAYERS = st.sampled_from(
    [
        lambda: nn.Linear(2, 2),
        lambda: nn.Linear(2, 2, bias=False),
        lambda: nn.BatchNorm1d(2),
        lambda: nn.LayerNorm(2),
        lambda: nn.RMSNorm(2),
        lambda: nn.ReLU(),
        lambda: nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)),
    ]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(LAYERS, min_size=1, max_size=6), st.data())
def test_every_trainable_parameter_falls_into_exactly_one_group(layers, data):
    made = [layer() for layer in layers]
    made += data.draw(st.lists(st.sampled_from(made), max_size=3), label="modules that occur twice")
    model = nn.Sequential(*made, nn.Linear(2, 2))
    for parameter in model.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
    model[-1].weight.requires_grad_(True)
    rules = {
        "linear": {"module": "Linear", "lr_factor": 2},
        "first": {"match": ["0.*", "*.weight"], "momentum": 0.1, "lr": 3},
    }
    rules = {name: rules[name] for name in data.draw(st.permutations([*rules]), label="rules")}
    groups = param_groups(model, **BASE, rules=rules)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    keys = [{k: v for k, v in g.items() if k not in ("name", "params")} for g in groups]
    assert all(a != b for i, a in enumerate(keys) for b in keys[:i])
    assert len({g["name"] for g in groups}) == len(groups)
    rows = explain_groups(copy.deepcopy(model), **BASE, rules=rules)
    sizes = {g["name"]: len(g["params"]) for g in groups}
    assert {n: [r.group for r in rows].count(n) for n in sizes} == sizes

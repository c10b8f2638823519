"""Runs that start from weights: what fits, what is told, and that resuming leaves them alone."""

import pytest
import torch
from ranks import run_ranks
from resume_cases import CRASH, ITERS, SAVED, conf_of, differing, state_of, train
from safetensors.torch import save_file
from torch import nn

from distrain.errors import ConfigError, ExitCode
from distrain.weights.load import load_tensors, start_from


class Model(nn.Module):
    """A body, a norm and a head of some classes."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, classes)


def tensors(model=None):
    torch.manual_seed(1)
    return dict((model or Model()).state_dict())


def loaded(given, model=None, *, strict=True, skip=()):
    torch.manual_seed(0)
    model = model or Model()
    num, left = load_tensors(model, given, strict=strict, skip=skip)
    return model.state_dict(), num, left


def test_all_that_fits_is_taken():
    given = tensors()
    state, num, left = loaded(given)
    assert (num, left) == (len(given), [])
    assert all(torch.equal(state[name], value) for name, value in given.items())


def test_a_new_head_stays_as_it_was_where_a_pattern_says_so():
    torch.manual_seed(0)
    model = Model(classes=5)
    head = model.head.weight.clone()
    state, num, left = loaded(tensors(), model, skip=["head.*"])
    assert left == ["head.weight", "head.bias"]
    assert num == len(state) - 2
    assert torch.equal(state["head.weight"], head)
    assert torch.equal(state["body.0.weight"], tensors()["body.0.weight"])


def test_not_strict_takes_what_is_common_and_never_another_shape():
    given = {"body.0.weight": torch.ones(4, 4), "other": torch.ones(1)}
    state, num, left = loaded(given, strict=False)
    assert (num, len(left)) == (1, len(state) - 1)
    assert state["body.0.weight"].eq(1).all()
    with pytest.raises(ConfigError, match=r"head.weight \[3, 4\] for \[5, 4\]"):
        loaded(tensors(), Model(classes=5), strict=False)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_names_of_ddp_and_compile_are_understood(wrapper):
    given = {wrapper + name: value for name, value in tensors().items()}
    assert loaded(given)[1] == len(given)


def test_a_shared_tensor_is_there_under_one_of_its_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

    model = Tied()
    assert load_tensors(model, {"b.weight": torch.ones(2, 2)}, strict=True, skip=())[0] == 1
    assert model.a.weight.eq(1).all()


def renamed(given, old, new):
    return {name.replace(old, new): value for name, value in given.items()}


@pytest.mark.parametrize(
    ("given", "keywords", "words"),
    [
        (
            renamed(tensors(), "head.", "fc.head."),
            {},
            ["missing: head.weight (did you mean fc.head.weight?), head.bias (did you mean",
             "unexpected: fc.head.weight, fc.head.bias", "init.strict=false"],
        ),
        (
            tensors(Model(classes=5)),
            {},
            ["another shape: head.bias [5] for [3], head.weight [5, 4] for [3, 4]",
             "init.skip=['head*']"],
        ),
        ({"x": torch.ones(1)}, {"strict": False}, ["body.0.weight", "and 4 more", "init.prefix"]),
        (
            tensors(),
            {"skip": ["haed.*"]},
            ["init.skip='haed.*' matches no tensor; did you mean head."],
        ),
        ({}, {}, ["missing: body.0.weight"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_and_copies_nothing(given, keywords, words):
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        loaded(given, model, **keywords)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_part_of_the_file_into_a_part_of_the_model(tmp_path):
    given = {"net." + name: value for name, value in tensors().items()}
    save_file(given | {"other.w": torch.ones(1)}, tmp_path / "a.safetensors")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.new = Model(), nn.Linear(3, 1)

    model = Outer()
    where = {"weights": str(tmp_path / "a.safetensors"), "prefix": "net.", "into": "backbone"}
    start_from(model, **where)
    assert torch.equal(model.backbone.head.bias, tensors()["head.bias"])
    with pytest.raises(
        ConfigError, match="init.prefix='net_': no name begins with it; available: net."
    ):
        start_from(model, **{**where, "prefix": "net_"})
    with pytest.raises(
        ConfigError, match="init.into=backbon: the model has .*did you mean backbone"
    ):
        start_from(model, **{**where, "into": "backbon"})
    with pytest.raises(ConfigError, match="init.weights=.*nowhere: there is no such file"):
        start_from(model, weights=str(tmp_path / "nowhere"))


EMA = {"ema": {"_target_": "distrain.hooks.EMA", "decay": 0.9}}


def chain(rank, folder):
    """Train a first run; start others from it, one of them interrupted; return the end states."""
    train(conf_of(hooks=EMA), folder / "first")
    init = {"weights": str(folder / "first")}
    still = conf_of(init=init, optim={"target": "torch.optim.SGD", "lr": 1e-30}, iters=1)
    train(still, folder / "still")
    ema = {**still, "init": {**init, "ema": "ema"}}
    train(ema, folder / "ema")
    code, _ = train(conf_of(init=init, stop={"after": CRASH}), folder / "broken")
    assert code is None, "it should have crashed"
    gone = {"weights": str(folder / "gone")}
    code, second = train(conf_of(init=gone), folder / "broken")  # not looked at any more
    assert code == ExitCode.FINISHED
    assert sorted(second) == list(range(SAVED, ITERS))
    train(conf_of(init=init), folder / "whole")


@pytest.mark.ranks
def test_a_run_starts_from_another_and_resumes_from_its_own(tmp_path):
    run_ranks(chain, 2, tmp_path)
    first, still = state_of(tmp_path / "first"), state_of(tmp_path / "still", 1)
    weights = [name for name in first["model"] if not name.startswith("net.1.")]
    assert len(weights) == 4
    for name in weights:  # of BatchNorm the statistics have moved
        assert torch.equal(still["model"][name], first["model"][name])
    average = state_of(tmp_path / "ema", 1)["model"]
    for name in weights:
        assert torch.equal(average[name], first["hooks"]["ema"]["average"][name])
        assert not torch.equal(average[name], first["model"][name])
    assert differing(state_of(tmp_path / "broken"), state_of(tmp_path / "whole")) == []


def start_nowhere(rank, folder):
    with pytest.raises(ConfigError) as caught:
        train(conf_of(init={"weights": str(folder)}), folder / "run")
    return str(caught.value)


@pytest.mark.ranks
def test_all_ranks_tell_the_same_mistake(tmp_path):
    texts = run_ranks(start_nowhere, 2, tmp_path)
    assert set(texts) == {
        f"init.weights={tmp_path}: this folder holds no checkpoint; give that of a run"
    }

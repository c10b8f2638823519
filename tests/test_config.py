"""Keys are checked, nodes become objects, and every mistake is one line with its key."""

import functools
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from distrain import schema
from distrain.config import build, explain, locate, resolve
from distrain.errors import ConfigError

SMALL = {
    "run": {"name": "a", "dir": "runs/a"},
    "model": {"_target_": "my.Model"},
    "data": {"batch_size": 8, "train": {"_target_": "my.Data"}},
    "trainer": {"max_iter": 10},
    "optim": {"lr": 0.1},
    "launch": {"_target_": "my.Launcher"},
}


def with_keys(**keys):
    """Return the small configuration with dotted keys set: a__b=1 is a.b=1."""
    conf = OmegaConf.create(SMALL)
    for key, value in keys.items():
        OmegaConf.update(conf, key.replace("__", "."), value, force_add=True)
    return conf


def message(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# keys


def test_what_is_left_out_has_its_default():
    conf = resolve(SMALL)
    assert conf["seed"] == 0
    assert conf["resume"] == "auto"
    assert conf["trainer"]["window"] == 20
    assert conf["data"] == {
        "batch_size": 8,
        "train": {"_target_": "my.Data"},
        "eval": None,
        "eval_batch_size": None,
        "workers": 0,
        "seed_samples": False,
    }


def test_values_have_the_type_of_their_key():
    conf = resolve(with_keys(optim__lr=1, trainer__max_iter=10.0, run__name=7))
    assert (conf["optim"]["lr"], type(conf["optim"]["lr"])) == (1.0, float)
    assert (conf["trainer"]["max_iter"], type(conf["trainer"]["max_iter"])) == (10, int)
    assert conf["run"]["name"] == "7"


def test_what_is_referred_to_is_looked_up():
    conf = with_keys(vars={"width": 3}, model={"_target_": "my.Model", "width": "${vars.width}"})
    assert resolve(conf)["model"]["width"] == 3
    assert type(resolve(conf)["model"]) is dict


def test_keywords_of_the_optimizer_are_free():
    assert resolve(with_keys(optim__momentum=0.9))["optim"]["momentum"] == 0.9


def test_rules_are_a_mapping_or_a_list():
    assert resolve(with_keys(optim__rules=[{"lr": 1}]))["optim"]["rules"] == [{"lr": 1}]
    assert resolve(with_keys(optim__rules={"a": {}}))["optim"]["rules"] == {"a": {}}
    assert message(resolve, with_keys(optim__rules=3)).startswith("optim.rules=3: ")


def test_a_hook_may_be_taken_out():
    hooks = {"eval": None, "mine": {"_target_": "my.Hook"}}
    assert resolve(with_keys(hooks=hooks))["hooks"] == hooks


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"optim__lr": "abc"}, "optim.lr=abc: a number is needed"),
        ({"optim__lr": float("nan")}, "optim.lr=nan: a number is needed"),
        ({"optim__lr": 10**400}, "optim.lr=1000"),
        ({"seed": 2**63}, "seed=9223372036854775808: a number of less than 64 bits is needed"),
        ({"optim__lr": True}, "optim.lr=true: a number is needed"),
        ({"optim__lr": None}, "optim.lr=null: a number is needed"),
        ({"optim__lr": -1}, "optim.lr=-1.0: at least 0 is needed"),
        ({"optim__lr": "???"}, "optim.lr: a value is needed, optim.lr=..."),
        ({"optim__lr": "${nowhere}"}, "optim.lr: Interpolation key 'nowhere' not found"),
        ({"trainer__max_iter": -1}, "trainer.max_iter=-1: at least 1 is needed"),
        ({"trainer__max_iter": 1.5}, "trainer.max_iter=1.5: a whole number is needed"),
        ({"trainer__max_itr": 5}, "trainer.max_itr: no such key; did you mean max_iter?"),
        ({"trainer__clip_norm": 0}, "trainer.clip_norm=0.0: a number above 0 is needed"),
        ({"trainer__precision": "fp8"}, "trainer.precision=fp8: one of fp32, bf16, fp16 is needed"),
        ({"trainer": 3}, "trainer=3: a group of keys is needed here, not one value"),
        ({"data__batch_size": 0}, "data.batch_size=0: at least 1 is needed"),
        (
            {"data__train": "my.Data"},
            "data.train=my.Data: needs keys, at least data.train.",
        ),
        ({"data__eval": {"a": 1}}, "data.eval._target_: a value is needed"),
        ({"hooks": {"a": {"_target_": ""}}}, "hooks.a._target_: a value is needed"),
        ({"plan": 1}, "plan=1: true or false is needed"),
        ({"resume": "maybe"}, "resume=maybe: one of auto, never, must is needed"),
        ({"resum": "auto"}, "resum: no such key; did you mean resume?"),
        ({"run__name": None}, "run.name: a value is needed"),
        ({"run__name": ""}, "run.name: a value is needed"),
        ({"run__name": "a\nb"}, "run.name='a\\nb': a text without control characters"),
        ({"run__dir": " a"}, "run.dir=' a': a text without control characters"),
        ({"model": None}, "nothing to train: give an experiment, +experiment="),
    ],
)
def test_mistakes_in_keys(keys, text):
    assert message(resolve, with_keys(**keys)).startswith(text)


def test_a_long_value_is_cut():
    assert len(message(resolve, with_keys(optim__lr="x" * 500))) < 100


def test_every_key_of_the_service_is_in_its_own_conf():
    conf = Path(__file__).parents[1] / "conf"
    base = OmegaConf.load(conf / "config.yaml")
    groups = {"trainer": conf / "trainer" / "default.yaml", "optim": conf / "optim" / "sgd.yaml"}
    for node, cls in (
        ("run", schema.RunKeys),
        ("data", schema.DataKeys),
        ("checkpoint", schema.CheckpointKeys),
        ("trainer", schema.TrainerKeys),
        ("optim", schema.OptimKeys),
    ):
        shown = OmegaConf.load(groups[node]) if node in groups else base[node]
        assert cls.__annotations__.keys() <= {str(key) for key in shown}, node


# objects


class Net:
    """Stands for what a user writes."""

    def __init__(self, width, depth=2, *, device=None):
        if width < 0:
            raise ValueError(f"width={width}: at least 0")
        if depth == 13:
            raise ValueError("an unlucky depth")
        if depth == 14:
            raise RuntimeError("no luck at all")
        self.width, self.depth, self.device = width, depth, device

    @classmethod
    def wide(cls):
        return cls(100)


NET = f"{__name__}.Net"


def node(**keys):
    return {"_target_": NET, **keys}


def test_build():
    net = build(node(width=3), "model")
    assert (net.width, net.depth, net.device) == (3, 2, None)


def test_build_from_a_method_and_a_function():
    assert build({"_target_": f"{NET}.wide"}).width == 100
    assert build({"_target_": "json.loads", "s": "[2, 3]"}) == [2, 3]


def test_the_context_fills_in_what_the_signature_names():
    net = build(node(width=3), "model", device="cpu", colour="red")
    assert net.device == "cpu"
    assert build(node(width=3, device="gpu"), "model", device="cpu").device == "gpu"


def test_nodes_inside_are_built_first():
    built = build(node(width=1, depth=[{"a": node(width=2)}, 3]), "model")
    assert built.depth[0]["a"].width == 2
    assert built.depth[1] == 3


def test_partial():
    make = build(node(_partial_=True, depth=5), "model", device="cpu")
    assert isinstance(make, functools.partial)
    assert (make(width=1).depth, make(width=1).device) == (5, "cpu")


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (node(widht=3), "model.widht: Net has no such keyword; did you mean width?"),
        (node(), "model.width: a value is needed, for Net"),
        (node(width=-1), "model.width=-1: at least 0"),
        (node(width=1, depth=13), "model: an unlucky depth"),
        (node(width=1, depth=node(widht=1)), "model.depth.widht: Net has no such keyword"),
        (node(width=1, depth=[node(width=-1)]), "model.depth.0.width=-1: at least 0"),
        ({"width": 3}, "model: needs a _target_, as in package.module.Name"),
        ({"_target_": "nowhere.Net"}, "model._target_=nowhere.Net: there is no module nowhere"),
        (
            {"_target_": "json.decode.X"},
            "model._target_=json.decode.X: json has no decode; did",
        ),
        ({"_target_": f"{NET}t"}, f"model._target_={NET}t: test_config has no Nett; did you mean"),
        ({"_target_": "math.pi"}, "model._target_=math.pi: a float cannot be called"),
        ({"_target_": "not a path"}, "model._target_=not a path: this is not an import path"),
        ({"_target_": "datetime.timedelta", "dys": 1}, "model: 'dys' is an invalid keyword"),
    ],
)
def test_mistakes_in_nodes(keys, text):
    assert message(build, keys, "model").startswith(text)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"decay": None}, "hooks.x.decay=null: a number is needed"),
        ({"decay": "high"}, "hooks.x.decay=high: a number is needed"),
        ({"period": [1]}, "hooks.x.period=[1]: a whole number is needed"),
        ({"period": 2.5}, "hooks.x.period=2.5: a whole number is needed"),
        ({"period": float("nan")}, "hooks.x.period=nan: a whole number is needed"),
    ],
)
def test_what_is_no_number_where_one_of_ours_takes_one(keys, text):
    assert message(build, {"_target_": "distrain.hooks.EMA", **keys}, "hooks.x") == text


def test_numbers_that_may_be_left_out():
    text = message(build, {"_target_": "distrain.hooks.EvalHook", "period": "often"}, "hooks.x")
    assert text == "hooks.x.period=often: a whole number is needed, or null"
    build({"_target_": "distrain.hooks.EvalHook", "period": None})
    build({"_target_": "distrain.hooks.EMA", "decay": 0})


def test_a_programming_error_stays_what_it_is():
    with pytest.raises(RuntimeError, match="no luck at all") as caught:
        build(node(width=1, depth=14), "model")
    assert caught.value.__notes__ == ["while building model: Net"]


@pytest.fixture
def modules(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("broken_here", "lacks_here", "package_here", "package_here.inner"):
        sys.modules.pop(name, None)


def test_a_module_that_does_not_import(modules):
    (modules / "broken_here.py").write_text("1 / 0\n")
    (modules / "lacks_here.py").write_text("import timm_is_not_here\n")
    text = message(locate, "broken_here.Net", "model._target_")
    assert text == (
        "model._target_=broken_here.Net: importing broken_here failed: ZeroDivisionError: "
        "division by zero"
    )
    text = message(locate, "lacks_here.Net", "model._target_")
    assert "importing lacks_here failed: No module named 'timm_is_not_here'" in text


def test_a_path_through_packages(modules):
    (modules / "package_here").mkdir()
    (modules / "package_here" / "__init__.py").write_text("from json import decoder as alias\n")
    (modules / "package_here" / "inner.py").write_text("class Net: pass\n")
    assert locate("package_here.inner.Net").__name__ == "Net"
    assert locate("package_here.alias.JSONDecoder").__name__ == "JSONDecoder"
    assert "did you mean inner?" in message(locate, "package_here.iner.Net")


# what others raise


def test_any_error_becomes_one_line():
    assert str(explain(ConfigError("as it is"))) == "as it is"
    assert str(explain(ValueError("first\n  second\n"))) == "first; second"
    assert str(explain(ValueError())) == "ValueError"

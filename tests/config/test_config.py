"""Keys are checked, nodes become objects, and every mistake is one line with its key."""

import dataclasses
import functools
import inspect
import sys
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, ListConfig, OmegaConf

from distrain.config import keys
from distrain.config.compose import build, explain, locate, resolve
from distrain.errors import ConfigError
from distrain.trainer.trainer import Trainer

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
        "collate": None,
        "build_first": False,
        "loader": None,
        "sampler": None,
    }


def test_values_have_the_type_of_their_key():
    conf = resolve(with_keys(optim__lr=1, trainer__max_iter=10.0, run__name=7))
    assert (conf["optim"]["lr"], type(conf["optim"]["lr"])) == (1.0, float)
    assert (conf["trainer"]["max_iter"], type(conf["trainer"]["max_iter"])) == (10, int)
    assert conf["run"]["name"] == "7"


def test_text_that_is_a_number_is_one(monkeypatch):
    monkeypatch.setenv("LR", "1e-3")
    monkeypatch.setenv("STEPS", "30")
    conf = resolve(with_keys(optim__lr="${oc.env:LR}", trainer__max_iter="${oc.env:STEPS}"))
    assert (conf["optim"]["lr"], conf["trainer"]["max_iter"]) == (0.001, 30)
    hook = build({"_target_": "distrain.hooks.EMA", "period": "20"})
    assert hook._period == 20


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
        ({"optim__lr": "abc"}, "optim.lr=abc: expected a number"),
        ({"optim__lr": "nan"}, "optim.lr=nan: expected a number"),
        ({"seed": "1.5"}, "seed=1.5: expected an integer"),
        ({"optim__lr": float("nan")}, "optim.lr=nan: expected a number"),
        ({"optim__lr": 10**400}, "optim.lr=1000"),
        ({"seed": 2**63}, "seed=9223372036854775808: expected a number of less than 64 bits"),
        ({"optim__lr": True}, "optim.lr=true: expected a number"),
        ({"optim__lr": None}, "optim.lr=null: expected a number"),
        ({"optim__lr": -1}, "optim.lr=-1.0: expected at least 0"),
        ({"optim__lr": "???"}, "optim.lr: expected a value, optim.lr=..."),
        ({"optim__lr": "${nowhere}"}, "optim.lr: Interpolation key 'nowhere' not found"),
        ({"trainer__max_iter": -1}, "trainer.max_iter=-1: expected at least 1"),
        ({"trainer__max_iter": 1.5}, "trainer.max_iter=1.5: expected an integer"),
        ({"trainer__max_itr": 5}, "trainer.max_itr: no such key; did you mean max_iter"),
        ({"trainer__clip_norm": 0}, "trainer.clip_norm=0.0: expected a number above 0"),
        ({"trainer__precision": "fp8"}, "trainer.precision=fp8: expected one of fp32, bf16, fp16"),
        ({"trainer": 3}, "trainer=3: expected a mapping of keys, not one value"),
        ({"data__batch_size": 0}, "data.batch_size=0: expected at least 1"),
        (
            {"data__train": "my.Data"},
            "data.train=my.Data: expected a mapping, at least data.train.",
        ),
        ({"data__eval": {"a": 1}}, "data.eval._target_: expected a value"),
        ({"hooks": {"a": {"_target_": ""}}}, "hooks.a._target_: expected a value"),
        ({"plan": 1}, "plan=1: expected true or false"),
        ({"resume": "maybe"}, "resume=maybe: expected one of auto, never, must"),
        ({"resum": "auto"}, "resum: no such key; did you mean resume?"),
        ({"run__name": None}, "run.name: expected a value"),
        ({"run__name": ""}, "run.name: expected a value"),
        ({"run__name": "a\nb"}, "run.name='a\\nb': expected text without control characters"),
        ({"run__dir": "s3://b/x"}, "run.dir=s3://b/x: expected a path of a mounted file system"),
        ({"run__dir": "file:///x"}, "run.dir=file:///x: expected a path of a mounted file system"),
        *(
            ({"run__name": name}, f"run.name={name}: expected a name without")
            for name in ("-m", "--all", "../up", "a/../../b", "a/..", ".", "/tmp/a")
        ),
        ({"run__name": "gs://b"}, "run.name=gs://b: expected a path of a mounted file system"),
        ({"init": {"weights": "hdfs://b"}}, "init.weights=hdfs://b: expected a path of a mounted"),
        ({"run__dir": " a"}, "run.dir=' a': expected text without control characters"),
        ({"model": None}, "nothing to train: give an experiment, +experiment="),
    ],
)
def test_mistakes_in_keys(keys, text):
    assert message(resolve, with_keys(**keys)).startswith(text)


def test_a_long_value_is_cut():
    assert len(message(resolve, with_keys(optim__lr="x" * 500))) < 100


def test_every_key_of_the_service_is_in_its_own_conf():
    conf = Path(__file__).parents[2] / "conf"
    base = OmegaConf.load(conf / "config.yaml")
    groups = {"trainer": conf / "trainer" / "default.yaml", "optim": conf / "optim" / "sgd.yaml"}
    for node, cls in (
        ("run", keys.RunKeys),
        ("data", keys.DataKeys),
        ("checkpoint", keys.CheckpointKeys),
        ("trainer", keys.TrainerKeys),
        ("optim", keys.OptimKeys),
    ):
        shown = OmegaConf.load(groups[node]) if node in groups else base[node]
        assert cls.__annotations__.keys() <= {str(key) for key in shown}, node


def test_a_default_is_the_same_in_the_schema_in_conf_and_in_the_trainer():
    conf = Path(__file__).parents[2] / "conf"
    shown = OmegaConf.to_container(OmegaConf.load(conf / "config.yaml"))
    trainer = OmegaConf.load(conf / "trainer" / "default.yaml")
    shown["trainer"] = OmegaConf.to_container(trainer)
    of_trainer = inspect.signature(Trainer).parameters
    for node, cls in (
        ("data", keys.DataKeys),
        ("checkpoint", keys.CheckpointKeys),
        ("eval", keys.EvalKeys),
        ("init", keys.InitKeys),
        ("eval", keys.EvalKeys),
        ("trainer", keys.TrainerKeys),
    ):
        plain = shown[node]
        for entry in dataclasses.fields(cls):
            if entry.default is dataclasses.MISSING or f"{plain[entry.name]}".startswith("${"):
                continue
            assert plain[entry.name] == entry.default, f"{node}.{entry.name}"
            if node == "trainer" and entry.name in of_trainer:
                assert of_trainer[entry.name].default == entry.default, entry.name


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


# as hydra.utils.instantiate


def remembers(*args, **keywords):
    """What it is called with, comparable."""
    return args, keywords


@dataclasses.dataclass
class Pair:
    a: object = None
    b: object = None


class Base:
    def __init__(self, width, *, depth=1):
        self.made = {"width": width, "depth": depth}


class Wrapped(Base):
    """As configurations of transformers: the decorator takes more than the function inside."""

    def _init(self, width=1):
        super().__init__(width)

    @functools.wraps(_init)
    def __init__(self, *args, num_labels=2, **keywords):
        self._init(*args, **{k: v for k, v in keywords.items() if k != "free"})
        self.made |= {"num_labels": num_labels, "free": keywords.get("free")}


class Forwards(Base):
    def __init__(self, **keywords):
        super().__init__(**keywords)


class Made(type):
    """A metaclass that takes keywords away."""

    def __call__(cls, *args, free=None, **keywords):
        return super().__call__(*args, **keywords)


class FromMade(Base, metaclass=Made):
    def __init__(self, width):
        super().__init__(width)


class OwnNew(Base):
    def __new__(cls, *args, **keywords):
        return super().__new__(cls)


@functools.wraps(Base)
def gives_width(**keywords):
    return Base(3, **keywords)


def here(name, **keys):
    return {"_target_": f"{__name__}.{name}", **keys}


def as_it_is(value):
    """Value with its containers' types, and objects by what they hold."""
    if isinstance(value, Base):
        return type(value).__name__, value.made
    if isinstance(value, Pair):
        return "Pair", as_it_is(value.a), as_it_is(value.b)
    if isinstance(value, functools.partial):
        return "partial", value.func, as_it_is(value.args), as_it_is(value.keywords)
    if isinstance(value, dict | DictConfig):
        return type(value), {k: as_it_is(v) for k, v in value.items()}
    if isinstance(value, list | tuple | ListConfig):
        return type(value), [as_it_is(v) for v in value]
    return value


INNER = {"_target_": f"{__name__}.remembers", "x": 1}
NESTED = [
    {"x": [1, {"y": 2}], "z": {"k": INNER}},
    {"x": [INNER, {"y": INNER}]},
    {"x": INNER | {"_args_": [1, [2]]}},
]


@pytest.mark.parametrize("convert", ["none", "partial", "object", "all", "ALL"])
@pytest.mark.parametrize("recursive", [True, False])
@pytest.mark.parametrize("keys", NESTED)
def test_containers_and_nodes_inside_are_as_hydra_makes_them(keys, convert, recursive):
    node = here("remembers", _convert_=convert, _recursive_=recursive, **keys)
    assert as_it_is(build(node)) == as_it_is(instantiate(node))


@pytest.mark.parametrize("outer", ["none", "all"])
@pytest.mark.parametrize("inner", ["none", "all"])
def test_nodes_inside_inherit_and_may_differ(outer, inner):
    child = here("remembers", x=[1], _convert_=inner)
    for node in (
        here("remembers", a=child, b=here("remembers", x=[1]), _convert_=outer),
        here("remembers", a={"k": here("remembers", x={"y": [1]})}, _convert_=outer),
        here("remembers", a=here("remembers", x=INNER, _recursive_=False), _convert_=outer),
        here("remembers", a=here("remembers", x=INNER, _recursive_=True), _recursive_=False),
    ):
        node = {"_convert_": "all"} | node
        assert as_it_is(build(node)) == as_it_is(instantiate(node))


@pytest.mark.parametrize(
    "node",
    [
        here("remembers", _args_=[1, 2], x=3),
        here("remembers", _args_=[INNER, [INNER]]),
        here("remembers", _args_=[]),
        here("Base", _args_=[1], depth=2),
        here("Base", width=1),
        here("Pair", a=INNER, b=here("Pair", _args_=[1, 2])),
        {"_target_": "datetime.timedelta", "_args_": [1], "hours": 2},
        {"_target_": "builtins.int", "_args_": ["7"]},
        {"_target_": "builtins.dict", "a": 1},
        here("Wrapped", num_labels=5),
        here("Wrapped", width=4, num_labels=5, free=1),
        here("Forwards", width=4, depth=5),
        here("FromMade", width=4, free=5),
        here("OwnNew", width=4),
        here("gives_width", depth=4),
        here("gives_width"),
    ],
    ids=str,
)
def test_what_hydra_builds_is_built(node):
    node = {"_convert_": "all"} | node
    assert as_it_is(build(node)) == as_it_is(instantiate(node))


def test_partial_with_arguments():
    node = here("remembers", _partial_=True, _args_=[1, INNER], x=INNER, _convert_="all")
    assert build(node)(5, y=6) == instantiate(node)(5, y=6)
    inside = here("remembers", f=here("remembers", _partial_=True, _args_=[1]))
    assert build(inside)[1]["f"](2) == ((1, 2), {})


def test_a_positional_argument_takes_the_place_of_the_context():
    assert build(here("Base", _args_=[1]), "model", width=2, depth=3).made == {
        "width": 1,
        "depth": 3,
    }


@pytest.mark.parametrize(
    ("node", "text"),
    [
        (
            here("Base", _args_=[1, 2]),
            "model._args_: expected at most 1 positional arguments for Base",
        ),
        (here("Base", _args_=[1], width=2), "model.width: given by _args_ already"),
        (here("Base", _args_=3), "model._args_=3: expected a list"),
        (
            here("Base", width=1, _convert_="some"),
            "model._convert_=some: expected one of none, partial",
        ),
        (here("Base", width=1, _recursive_=3), "model._recursive_=3: expected true or false"),
        (here("Base", width=1, _partial_="x"), "model._partial_=x: expected true or false"),
        (here("Forwards", width=1, dept=1), "model: Base.__init__() got an unexpected keyword"),
        (here("OwnNew"), "model: Base.__init__() missing 1 required positional argument"),
        (here("Base", _args_=[here("Base")]), "model._args_.0.width: expected a value, for Base"),
    ],
)
def test_mistakes_in_arguments(node, text):
    assert message(build, node, "model").startswith(text)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (node(widht=3), "model.widht: Net has no such keyword; did you mean width?"),
        (node(), "model.width: expected a value, for Net"),
        (node(width=-1), "model.width=-1: at least 0"),
        (node(width=1, depth=13), "model: an unlucky depth"),
        (node(width=1, depth=node(widht=1)), "model.depth.widht: Net has no such keyword"),
        (node(width=1, depth=[node(width=-1)]), "model.depth.0.width=-1: at least 0"),
        ({"width": 3}, "model: expected a _target_, as in package.module.Name"),
        ({"_target_": "nowhere.Net"}, "model._target_=nowhere.Net: no module nowhere"),
        (
            {"_target_": "json.decode.X"},
            "model._target_=json.decode.X: json has no decode; did",
        ),
        ({"_target_": f"{NET}t"}, f"model._target_={NET}t: test_config has no Nett; did you mean"),
        ({"_target_": "math.pi"}, "model._target_=math.pi: expected a callable; it is a float"),
        ({"_target_": "not a path"}, "model._target_=not a path: expected an import path"),
        ({"_target_": "datetime.timedelta", "dys": 1}, "model: 'dys' is an invalid keyword"),
    ],
)
def test_mistakes_in_nodes(keys, text):
    assert message(build, keys, "model").startswith(text)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"decay": None}, "hooks.x.decay=null: expected a number"),
        ({"decay": "high"}, "hooks.x.decay=high: expected a number"),
        ({"period": [1]}, "hooks.x.period=[1]: expected an integer"),
        ({"period": 2.5}, "hooks.x.period=2.5: expected an integer"),
        ({"period": float("nan")}, "hooks.x.period=nan: expected an integer"),
    ],
)
def test_what_is_no_number_where_one_of_ours_takes_one(keys, text):
    assert message(build, {"_target_": "distrain.hooks.EMA", **keys}, "hooks.x") == text


def test_an_integer_above_the_largest_float_is_one():
    build({"_target_": "distrain.hooks.Throughput", "samples_per_step": 10**400}, "hooks.x")


def test_the_keys_of_an_unpacked_typed_dict_are_keywords():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule = {"_target_": "distrain.schedule.WarmupLinearLR", "max_iters": 4}
    built = build({**schedule, "warmup_iters": "3"}, "schedule", optimizer=optimizer)
    assert built.warmup_iters == 3
    for mistake, text in (
        ({"warmup_iter": 3}, "schedule.warmup_iter: WarmupLinearLR has no such keyword; did you"),
        ({"warmup_iters": "x"}, "schedule.warmup_iters=x: expected an integer"),
    ):
        call = functools.partial(build, optimizer=optimizer)
        assert message(call, {**schedule, **mistake}, "schedule").startswith(text)


def test_numbers_that_may_be_left_out():
    node = {"_target_": "distrain.hooks.Throughput", "samples_per_step": "many"}
    text = message(build, node, "hooks.x")
    assert text == "hooks.x.samples_per_step=many: expected an integer, or null"
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

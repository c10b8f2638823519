"""Code blocks of README.md and docs/: Python runs, YAML composes and builds, commands are tried.

`first-hour.md` is run line by line by test_tutorial.py. What is not run here is listed with the
reason; a block that is neither run nor listed fails.
"""

import os
import re
import shlex
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torchmetrics  # noqa: F401 - imports transformers, whose name a stand-in takes later
import yaml
from torch import nn

import distrain
from distrain.cli.command import Command, from_here
from distrain.config import compose as config
from distrain.config import overrides
from distrain.errors import ExitCode
from distrain.job.job import TrainJob

ROOT = Path(__file__).parents[1]
# configuration.md holds the files of conf/, which other tests compose
PAGES = [ROOT / "README.md", *sorted({*ROOT.glob("docs/*.md")} - {ROOT / "docs/configuration.md"})]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)

# first word of a command -> why it is not run
NOT_RUN = {
    "tensorboard": "does not end; test_tensorboard_in_browser.py looks at its pages",
    "squeue": "needs a cluster",
    "scancel": "needs a cluster; tests/slurm cancels jobs",
    "sbatch": "needs a cluster; tests/slurm submits the scripts",
    "torchrun": "needs 8 GPUs; test_launch.py starts ranks by it",
    "docker": "needs an engine; make image builds it",
    "apptainer": "needs an engine",
    "srun": "needs a cluster",
    "eval": "a shell function; test_completion.py calls it",
}
# first line of a block that is no code of a language here
SHOWN = {
    "distrain: starting 2 ranks": "output",
    "conf/          Hydra groups: config.yaml, then experiment launch model data optim schedule "
    "trainer hooks with": "a tree",
    "hook.before_train()": "pseudo code of the loop",
    "the other ranks wait for rank 2 (n3, GPU 0, process 4711): in a step of 0.12 s it takes "
    "0.031 s more than": "output",
}

PROJECT = """
import torch
from torch import nn
from torch.nn import functional

import distrain


class Layers(nn.Module):
    def __init__(self, name):
        super().__init__()
        setattr(self, name, nn.ModuleList(nn.Linear(4, 4) for _ in range(2)))
        self.layers = getattr(self, name)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.layer = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        for layer in (*self.blocks, *self.layer):
            x = layer(x)
        return x


class Model(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.backbone = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
        self.encoder = Encoder()
        self.table = nn.Embedding(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 3)

    def logits(self, images):
        x = self.backbone(images) + self.table.weight[0]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(self.encoder(x)))

    def forward(self, images, labels):
        return functional.cross_entropy(self.logits(images), labels)

    def metrics(self, images, labels):
        return {"accuracy": self.logits(images).argmax(1).eq(labels).float()}

    def predict(self, images, labels):
        return {"preds": self.logits(images).softmax(1), "target": labels}


def errors(preds, target):
    return (preds.argmax(1) != target).sum()


Net = Model


class Blobs(torch.utils.data.Dataset):
    labels = [i % 3 for i in range(512)]
    lengths = [1 + i % 50 for i in range(512)]

    def __init__(self, **keywords):
        self.keywords = keywords

    def __len__(self):
        return 512

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return torch.randn(4, generator=generator), index % 3


def lines(epoch=0):
    yield from (Blobs()[i] for i in range(64))


def collate(samples):
    return torch.utils.data.default_collate(samples)


Photos = Sentences = Train = Eval = Tokens = Blobs


class LitClassifier(Model):
    def training_step(self, batch, batch_idx):
        return self(*batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LitManual(LitClassifier):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self(*batch))
        self.optimizers().step()


class Norms(distrain.HookBase):
    def __init__(self, every=1):
        self.every = every
"""
MINE = """# @package _global_
model: {_target_: my_project.Model, width: 32}
data:
  batch_size: 64
  train: {_target_: my_project.Blobs, split: train}
  eval: {_target_: my_project.Blobs, split: test}
trainer: {max_iter: 2}
"""


def blocks(language, *, columns=False):
    """Yield a test case of each block of a language; only those in two columns, or the others."""
    for page in PAGES:
        for match in FENCE.finditer(page.read_text()):
            is_columns = re.match(r"# .*  # distrain\n", match[2]) is not None
            if page.name != "first-hour.md" and match[1] == language and is_columns == columns:
                line = page.read_text()[: match.start()].count("\n") + 1
                yield pytest.param(match[2], id=f"{page.name}:{line}")


def commands():
    for block in blocks(""):
        text = block.values[0].replace("\\\n", " ")
        if text.splitlines()[0] not in SHOWN:
            for line in text.splitlines():
                yield pytest.param(line, id=f"{block.id} {line[:40]}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A project with a short run of its own, under all names that the pages have for runs."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "my_project.py").write_text(PROJECT)
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "conf" / "experiment" / "mine.yaml").write_text(MINE)
    before = os.getcwd()
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    argv = ["--config-dir", "conf", "+experiment=mine", "+with=ema", "launch.in_process=true"]
    try:
        for name in ("mine", "digits", "other", "slower", "pretrained"):
            sys.argv[1:], old = [*argv, f"run.name={name}"], sys.argv[1:]
            assert Command(sys.argv[1:]).run() is ExitCode.FINISHED
            sys.argv[1:] = old
        import my_project

        head = {"head.weight": torch.zeros(3, 4)}
        torch.save(my_project.Model().backbone.state_dict() | head, "backbone.pt")
        yield folder
    finally:
        os.chdir(before)
        sys.path.remove(str(folder))
        sys.modules.pop("my_project", None)


@pytest.fixture
def compose(folder, monkeypatch):
    """Return a function that composes a command and builds all that it names, without a step."""
    monkeypatch.chdir(folder)
    built = []

    def start(self, cfg):
        conf = config.resolve(cfg)
        config.build(conf["launch"], "launch")
        built.append(TrainJob(conf, conf["run"]["dir"]).plan())
        return ExitCode.FINISHED

    def compose(*argv):
        built.clear()
        argv = overrides.readable(from_here(argv))
        monkeypatch.setattr(sys, "argv", ["distrain", *argv])
        code = Command(argv).run()
        assert built
        return code

    monkeypatch.setattr(Command, "_start", start)
    return compose


@pytest.mark.parametrize("line", [*commands()])
def test_a_command(line, compose, capfd):
    if "$(" in line and line.startswith("eval"):
        words = ["eval"]
    else:
        words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if words[0] in NOT_RUN:
        for word in words:
            assert not word.startswith("slurm/") or (ROOT / word).exists()
        return
    assert words[:2] == ["python", "-m"], "neither run nor listed in NOT_RUN"
    module, argv = words[2], words[3:]
    if "hydra/sweeper=optuna" in argv:  # test_tune.py runs it
        return
    if module == "distrain":
        code = compose(*argv)
    elif module == "distrain.weights":
        from distrain.cli.weights import main

        Path(argv[-1]).unlink(missing_ok=True)
        code = main(argv)
    elif module == "distrain.evaluate":  # test_evaluate_command.py evaluates a run
        from distrain.cli.evaluate import build_parser, changed
        from distrain.job.load import read_conf

        options = build_parser().parse_intermixed_args(argv)
        changed(read_conf(options.run), options.overrides)
        code = 0
    elif module == "distrain.tune":  # test_tune.py runs it
        from distrain.tune.halving import build_parser, plan

        search, trials = plan(*build_parser().parse_known_args(argv))
        code = compose(*search.arguments, *trials[0].overrides)
    elif module == "distrain.checkpoint":
        from distrain.cli.checkpoint import main

        if argv[0] == "--verify-resume":  # test_verify.py runs it: minutes
            from distrain.cli.verify_resume import build_parser

            code = compose(*build_parser().parse_known_args(argv[1:])[1])
        else:
            code = main(argv)
    else:
        assert module == "distrain.runs"
        from distrain.runs.__main__ import run

        if argv[:1] == ["plot"]:
            pytest.importorskip("matplotlib")
        is_resume = argv[:1] == ["resume"]  # test_runs.py resumes one
        code = compose("+experiment=digits", *argv[2:]) if is_resume else run(argv)
    out, err = capfd.readouterr()
    assert code == 0, out + err


def experiment(text, folder):
    """Write a block as an experiment, with the rest of one where it is a part of it."""
    if "@package" not in text:
        rest = [part for part in re.split(r"^(?=\w)", MINE, flags=re.M) if part[0] != "#"]
        keys = set(re.findall(r"^(\w+):", text, re.M))
        if "defaults" in keys and "null" in text:
            rest = [part.replace("my_project.Model,", "my_project.LitModel,") for part in rest]
        text = "# @package _global_\n" + text
        text += "".join(part for part in rest if part.partition(":")[0] not in keys)
    (folder / "conf" / "experiment" / "block.yaml").write_text(text)


@pytest.fixture
def stand_ins(folder, monkeypatch):
    """Names of libraries and of the reader's own code, as small as they can be."""
    import my_project

    class LitModel(my_project.Model):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1), None

    class GPT2LMHeadModel(nn.Linear):
        def __init__(self, config=None):
            super().__init__(2, 1)

        def forward(self, input_ids, labels):
            return {"loss": super().forward(input_ids).square().mean()}

        def save_pretrained(self, path):
            assert path == "gpt2-mine"

        @classmethod
        def from_pretrained(cls, pretrained_model_name_or_path):
            return cls()

    module = types.ModuleType("transformers")
    module.AutoModelForCausalLM = module.GPT2LMHeadModel = GPT2LMHeadModel
    module.AutoTokenizer = types.SimpleNamespace(from_pretrained=str)
    module.DataCollatorWithPadding = lambda tokenizer: torch.utils.data.default_collate
    module.PreTrainedTokenizerBase = type("Tokenizer", (), {})  # datasets asks for it
    monkeypatch.setitem(sys.modules, "transformers", module)
    monkeypatch.setattr(my_project, "LitModel", LitModel, raising=False)
    return my_project


def kubernetes_command(text, monkeypatch):
    """Return the overrides of a TrainJob; none for another resource, whose parts are checked."""
    spec = yaml.safe_load(text)["spec"]
    if "trainer" not in spec:
        [job] = spec["template"]["spec"]["replicatedJobs"]
        pod = job["template"]["spec"]["template"]["spec"]
        [container] = pod["containers"]
        # names that the operator looks for
        assert job["name"] == container["name"] == "node"
        assert job["template"]["metadata"]["labels"] == {
            "trainer.kubeflow.org/trainjob-ancestor-step": "trainer"
        }
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}
        return []
    trainer = spec["trainer"]
    assert trainer["command"] == ["torchrun", "-m", "distrain"]
    for name in "LOCAL_RANK", "RANK":  # as torchrun sets it for a rank
        monkeypatch.setenv(name, "0")
    for name in "WORLD_SIZE", "LOCAL_WORLD_SIZE":  # of one rank: nothing is started here
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "node-0")
    monkeypatch.setenv("MASTER_PORT", "29500")
    for entry in trainer["env"]:
        assert isinstance(entry["value"], str)
    [folder] = [word for word in trainer["args"] if word.startswith("--config-dir=")]
    assert folder == "--config-dir=conf"
    argv = [word for word in trainer["args"] if word not in (folder, "+experiment=mine")]
    assert "launch=external" in argv
    return ["+experiment=block", *argv]


@pytest.mark.parametrize("text", [*blocks("yaml")])
def test_yaml(text, compose, stand_ins, folder, monkeypatch, capfd):
    if "/data/tokens" in text:  # files that the example reads
        (folder / "tokens").mkdir(exist_ok=True)
        np.save(folder / "tokens" / "shard.npy", np.zeros(10_000, np.uint16))
        text = text.replace("/data/tokens", str(folder / "tokens"))
    if "/data/stream" in text:
        (folder / "stream.jsonl").write_text('{"x": 1}\n')
        text = text.replace("/data/stream/*", str(folder / "stream"))
    argv = ["+experiment=block"]
    if text.startswith("apiVersion"):
        argv = kubernetes_command(text, monkeypatch)
        if not argv:
            return
        text = MINE
    experiment(text, folder)
    code = compose("--config-dir", "conf", *argv)
    assert code == 0, capfd.readouterr().err


def names(my_project):
    """Return what the text around a block has explained already."""
    model = my_project.Model(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = [torch.randn(4, 4), torch.tensor([0, 1, 2, 0])]
    value = torch.tensor(0.5)
    return {
        "distrain": distrain,
        "my_project": my_project,
        "torch": torch,
        "nn": nn,
        "HookBase": distrain.HookBase,
        "get_event_storage": distrain.get_event_storage,
        "cross_entropy": nn.functional.cross_entropy,
        "model": model,
        "optimizer": optimizer,
        "opt": optimizer,
        "loader": [batch] * 8,
        "labels": batch[1],
        "hits": torch.ones(4),
        "entropy": value,
        "a": value,
        "b": value,
        "class_loss": value,
        "box_loss": value,
        "num": 3,
        "image": torch.rand(3, 4, 4),
        "logits": batch[0],
        "config": None,
        "hooks": [],
        "step": lambda: None,
    }


def run_python(text, scope, storage):
    """Run a block; what is written as the inside of a function or a method is called once."""
    text = textwrap.dedent(text)
    if re.search(r"^return |self\.", re.sub(r"(?m)^ +.*\n", "", text), re.M):
        body = textwrap.indent(text, "    ")
        text = f"def inside(self):\n{body}\ninside(this)\n"
    exec(compile(text, "block", "exec"), scope)


@pytest.mark.parametrize("text", [*blocks("python")])
def test_python(text, stand_ins, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(distrain.Trainer, "train", short(distrain.Trainer.train))
    import safetensors.torch

    scope = names(stand_ins) | {"safetensors": safetensors}
    if "pandas" in text:
        scope["pandas"] = pytest.importorskip("pandas")
    if "GPT2LMHeadModel" in text:
        tokens = {"input_ids": torch.rand(4, 2), "labels": torch.zeros(4)}
        scope |= {"GPT2LMHeadModel": sys.modules["transformers"].GPT2LMHeadModel}
        model = scope["GPT2LMHeadModel"]()
        scope |= {"loader": [tokens] * 8, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    if "hits / len" in text:
        scope["hits"] = torch.tensor(3.0)
    if "iter_0000000500" in text:
        text = text.replace("0500", "0002")
    pulse = types.SimpleNamespace(phase=lambda phase: distrain.EventStorage(0))
    scope["Phase"] = distrain.heartbeat.Phase
    scope["this"] = types.SimpleNamespace(trainer=types.SimpleNamespace(pulse=pulse))
    with distrain.EventStorage(0) as storage:
        scope["storage"] = storage
        storage.put_scalars(loss=1.0)
        storage.spread = {"perf/data_s": (0.1, 0, 0.2, 1)}.__getitem__  # of several ranks
        run_python(text, scope, storage)


def short(train):
    def shortened(self, start_iter, max_iter):
        return train(self, start_iter, 2 if isinstance(max_iter, str) else min(max_iter, 2))

    return shortened


@pytest.mark.parametrize("text", [*blocks("python", columns=True)])
def test_the_right_column(text, compose, stand_ins, folder, monkeypatch, capfd):
    """What is ours beside another trainer's: Python, YAML, a command at its end."""
    monkeypatch.setattr(distrain.Trainer, "train", short(distrain.Trainer.train))
    start = text.splitlines()[0].index("# distrain")
    right = "\n".join(line[start:] for line in text.splitlines()[1:]) + "\n"
    *lines, last = right.rstrip().splitlines()
    if last.startswith("python"):
        argv = shlex.split(last)[3:]
        assert compose("--config-dir", "conf", *argv) == 0, capfd.readouterr().err
        right = "\n".join(lines) + "\n"
    if re.match(r"\w+: ", right):
        experiment(right, folder)
        assert compose("--config-dir", "conf", "+experiment=block") == 0, capfd.readouterr().err
        return
    scope = names(stand_ins) | {"process_group": distrain.distributed.process_group}
    scope["Trainer"] = distrain.Trainer
    with distrain.EventStorage(0) as storage:
        run_python(right, scope, storage)


def test_what_is_listed_is_in_the_pages():
    text = "\n".join(page.read_text() for page in PAGES)
    assert all(f"\n{word} " in text or f" {word} " in text for word in NOT_RUN)
    assert all(line in text for line in SHOWN)
    assert {match[1] for page in PAGES for match in FENCE.finditer(page.read_text())} <= {
        "",
        "sh",  # of the first hour
        "text",  # a diagram
        "console",
        "yaml",
        "python",
    }

"""The command line without training: Hydra's part, sweeps, errors, exit codes."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import distrain.job.job
from distrain.cli.command import Command, from_here
from distrain.cli.sweep import folder_name, worst
from distrain.config import compose as config
from distrain.config import overrides
from distrain.errors import ConfigError, ExitCode, RankFailed
from distrain.launch import Launcher
from distrain.runs import control
from distrain.runs.records import read

ROOT = Path(__file__).parents[2]
STARTED = []


@dataclasses.dataclass
class Job:
    """Stands for the training job: notes that it ran, and ends as `vars.end` says."""

    conf: dict
    run_dir: str

    def __call__(self) -> ExitCode:
        STARTED.append(self)
        match self.conf["vars"].get("end"):
            case "stop":
                return ExitCode.STOPPED
            case "config":
                raise ConfigError("data.train: it is empty")
            case "fail":
                raise RankFailed("rank 1 failed: ValueError: bad (log: x)\nTraceback ...")
            case "crash":
                raise KeyError("a mistake of ours")
        return ExitCode.FINISHED


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Return a function that runs a command line here; it returns code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distrain.job.job, "TrainJob", Job)
    STARTED.clear()

    def command(*argv):
        monkeypatch.setattr(sys, "argv", ["distrain", *argv])
        code = Command(argv).run()
        out, err = capfd.readouterr()
        return code, out, err

    return command


DIGITS = ("+experiment=digits", "launch.in_process=true")


def run_names(tmp_path):
    return sorted(str(p.parent.relative_to(tmp_path)) for p in tmp_path.rglob("run.yaml"))


# one run


def test_a_run(command, tmp_path):
    assert command(*DIGITS, "optim.lr=0.25") == (ExitCode.FINISHED, "", "")
    (job,) = STARTED
    assert job.conf["optim"]["lr"] == 0.25
    assert job.conf["run"] == {"name": "digits", "dir": "runs/digits"}
    assert job.run_dir == str(tmp_path / "runs" / "digits")
    assert sorted(os.listdir(tmp_path)) == ["runs"]  # Hydra has written nothing
    assert yaml.safe_load((tmp_path / "runs/digits/run.yaml").read_text()) == job.conf


@pytest.mark.parametrize("sweep", [(), ("-m", "seed=1,2")])
def test_what_an_override_refers_to_is_looked_up_again_by_resume(
    command, tmp_path, monkeypatch, sweep
):
    monkeypatch.setenv("KEY_OF_MINE", "hunter2")
    argv = [*DIGITS, "+vars.api_key=${oc.env:KEY_OF_MINE}", "+vars.lr=0.05", "optim.lr=${vars.lr}"]
    assert command(*sweep, *argv)[0] is ExitCode.FINISHED
    assert STARTED[0].conf["vars"] == {"api_key": "hunter2", "lr": 0.05}
    run_dir = Path(STARTED[0].run_dir)
    assert "hunter2" not in (run_dir / "command.json").read_text()
    again = control.command(read(run_dir).starts[-1], ["vars.lr=0.5"], run_dir=run_dir)
    assert command(*again, "allow_changes=[optim.lr]")[0] is ExitCode.FINISHED
    assert STARTED[-1].run_dir == str(run_dir)
    assert STARTED[-1].conf["vars"] == {"api_key": "hunter2", "lr": 0.5}
    assert STARTED[-1].conf["optim"]["lr"] == 0.5


def test_a_resumed_run_needs_no_initial_weights(command, tmp_path):
    (tmp_path / "w.pt").touch()
    argv = [*DIGITS, "init.strict=false"]
    assert command(*argv, "init.weights=w.pt")[0] is ExitCode.FINISHED
    changes = ["init.weights=null", "allow_changes=[init.weights]"]
    assert command(*argv, *changes)[0] is ExitCode.FINISHED
    assert len(STARTED) == 2


def test_resume_asks_for_all_secrets_at_once(command):
    assert command(*DIGITS, "+vars.api_key=a", "+vars.lr=1", "+vars.hf_token=b")[0] is (
        ExitCode.FINISHED
    )
    run_dir = Path(STARTED[0].run_dir)
    with pytest.raises(ConfigError) as caught:
        control.command(read(run_dir).starts[-1], [], run_dir=run_dir)
    assert str(caught.value) == (
        "vars.api_key, vars.hf_token: command.json holds no secrets; expected them again: "
        f"python -m distrain.runs resume {run_dir} vars.api_key=... vars.hf_token=..."
    )


WITH = {
    path.stem: path.read_text()
    for path in ROOT.glob("conf/with/*.yaml")
    if "@package _global_" not in path.read_text()  # of several parts: test_schedule_free.py
}


@pytest.mark.parametrize("name", sorted(WITH))
def test_one_word_adds_a_node_with_all_its_keys(command, name):
    more = {"precise_bn": ["hooks.eval.period=7"], "swa": ["hooks.swa.start=3"]}.get(name, [])
    assert command(*DIGITS, f"+with={name}", *more) == (ExitCode.FINISHED, "", "")
    found = STARTED[0].conf
    for key in re.match("# @package (.*)", WITH[name])[1].split("."):
        found = found[key]
    ((word, node),) = yaml.safe_load(WITH[name]).items()
    assert word == name, "the word is the name of the node"
    assert found[name].keys() == node.keys()
    parameters = inspect.signature(config.locate(node["_target_"])).parameters.values()
    names = {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}
    assert node.keys() - {"_target_"} == names - {"model"}
    assert name != "precise_bn" or found[name]["period"] == 7


@pytest.mark.parametrize(
    ("end", "code", "text"),
    [
        ("stop", ExitCode.STOPPED, ""),
        ("config", ExitCode.BAD_CONFIG, "distrain: data.train: it is empty\n"),
        ("fail", ExitCode.FAILED, "distrain: rank 1 failed: ValueError: bad (log: x)\nTraceback"),
    ],
)
def test_ends(command, tmp_path, end, code, text):
    result, _, err = command(*DIGITS, f"+vars.end={end}")
    assert result is code
    assert err.startswith(text)
    assert (tmp_path / "runs").exists() == (end != "config")  # a mistake leaves nothing


def test_a_crash_of_ours_keeps_its_traceback(command):
    with pytest.raises(KeyError, match="a mistake of ours"):
        command(*DIGITS, "+vars.end=crash")


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ((), "nothing to train: give an experiment, +experiment=digits|multiloss|pydoc_gpt"),
        (("+experiment=digitz",), "experiment=digitz: no such choice; did you mean digits? avail"),
        (
            (*DIGITS, "optim=adamww"),
            "optim=adamww: no such choice; did you mean adamw? available: ",
        ),
        (
            (*DIGITS, "optim.lrr=1"),
            "optim.lrr: no such key; did you mean optim.lr?",
        ),
        ((*DIGITS, "foo=1"), "foo: no such key; available: "),
        ((*DIGITS, "x=["), "cannot read 'x=[': no viable alternative"),
        ((*DIGITS, "optim.lr=1,2"), "Ambiguous value for argument 'optim.lr=1,2'; "),
        ((*DIGITS, "schedule=multistep"), "schedule.milestones: expected a value, "),
        ((*DIGITS, "seed=${env:HOME}"), "seed: "),
        ((*DIGITS, "launch.rank=3"), "launch.rank: no such key; did you mean launch.ranks?"),
        ((*DIGITS, "launch.ranks=0"), "launch.ranks=0: expected an integer >= 1"),
        ((*DIGITS, "run.dir=/proc/none"), "run.dir=/proc/none: "),
        ((*DIGITS, "run.dir=s3://bucket/a"), "run.dir=s3://bucket/a: expected a path of a mounted"),
        ((*DIGITS, "run.name=s3://bucket/a"), "run.name=s3://bucket/a: expected a path of a"),
        ((*DIGITS, "init.weights=gs://b/a.pt"), "init.weights=gs://b/a.pt: expected a path of a"),
        ((*DIGITS, "init.ema=a"), "init.ema=a: expected init.weights=PATH with it, or no init.ema"),
        ((*DIGITS, "init.prefix=a."), "init.prefix=a.: expected init.weights=PATH with it"),
        ((*DIGITS, "init.into=a"), "init.into=a: expected init.weights=PATH with it"),
        ((*DIGITS, "init.skip=[a]"), "init.skip=['a']: expected init.weights=PATH with it"),
        ((*DIGITS, "init.strict=false"), "init.strict=false: expected init.weights=PATH with it"),
        ((*DIGITS, "optim.rules.f={lr:1}"), "optim.rules.f: no such key; +optim.rules.f=... adds"),
        (("-m", *DIGITS, "optim=null,sgd"), "a group cannot be null; expected ~GROUP"),
        (("+experiment=42",), "the choice of a group: expected a name; put one that looks like"),
        (
            (*DIGITS, '+hooks.x.start={"a.*": 5}'),
            """cannot read '+hooks.x.start={"a.*": 5}': a key in quotes is read in YAML files """
            """only; write "a.*": ... below hooks.x.start in the experiment""",
        ),
        (
            (*DIGITS, "data.sampler._target_=my.Order"),
            "data.sampler._target_: no such key; 'data.sampler={_target_: ...}' or +data.",
        ),
        ((*DIGITS, "run.name=(x"), "cannot read 'run.name=(x': "),
        (
            (*DIGITS, "schedule._target_=torch.optim.lr_scheduler.StepLR", "schedule.warmup=3"),
            "schedule.warmup: no such key; did you mean schedule.warmup_iters",
        ),
        ((*DIGITS, "--config-dir", "none"), "Additional config directory"),
        (("--config-name", "none"), "--config-name=none: no such file"),
        (
            ("-m", *DIGITS, "optim=sgd,none"),
            "optim=none: no such choice; available: adamw, lamb",
        ),
    ],
)
def test_a_mistake_is_one_line(command, tmp_path, argv, text):
    code, out, err = command(*argv)
    assert code is ExitCode.BAD_CONFIG
    assert err.startswith(f"distrain: {text}".partition("...")[0])
    assert err.count("\n") == 1
    assert out == ""
    assert os.listdir(tmp_path) == []
    assert not STARTED


def test_a_broken_file_is_one_line(command, tmp_path):
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("a: [1\nb: }")
    code, _, err = command("--config-dir", "conf", "+experiment=mine")
    assert code is ExitCode.BAD_CONFIG
    assert err.count("\n") == 1
    assert "mine.yaml" in err


def test_a_file_that_is_not_utf_8_is_named(command, tmp_path):
    write_conf(tmp_path / "conf", "experiment/mine", HEAD)
    path = tmp_path / "conf/experiment/mine.yaml"
    lines = [b"# a comment that is longer than what is read at once\n"] * 1000
    path.write_bytes(path.read_bytes() + b"".join(lines) + "# café\n".encode("latin-1"))
    code, _, err = command(*MINE)
    assert code is ExitCode.BAD_CONFIG
    line = path.read_bytes().count(b"\n")
    assert err == f"distrain: {path}, line {line}: expected a file in UTF-8\n"


def test_the_traceback_is_there_when_asked_for(command, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, _, err = command(*DIGITS, "optim.lr=abc")
    assert code is ExitCode.BAD_CONFIG
    assert "Traceback" in err
    assert err.splitlines()[-1] == "distrain: optim.lr=abc: expected a number"


@pytest.mark.parametrize("name", ["a b", "a'b\"c", "a;touch x", "$(touch x)", "`x`", "äß"])
def test_any_name_is_only_a_name(command, tmp_path, name):
    quoted = "'" + name.replace("'", "\\'") + "'"
    code, _, err = command(*DIGITS, f"run.name={quoted}")
    assert (code, err) == (ExitCode.FINISHED, "")
    assert os.listdir(tmp_path / "runs") == [name]
    assert sorted(os.listdir(tmp_path)) == ["runs"]


# Hydra's own flags


def test_help(command, tmp_path, capfd):
    with pytest.raises(SystemExit) as left:
        command("--help")
    assert left.value.code == 0
    out, err = capfd.readouterr()
    assert "experiment: digits, multiloss, pydoc_gpt\n" in out
    assert "  max_iter: ???\n" in out
    assert err == ""


def test_cfg(command, tmp_path):
    code, out, _ = command(*DIGITS, "--cfg", "job", "--package", "trainer")
    assert code is ExitCode.FINISHED
    assert "max_iter: 500" in out
    assert os.listdir(tmp_path) == []


def write_conf(folder: Path, name: str, text: str) -> None:
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


OWN = "# @package _global_\nseed: 7\nvars: {who: %s}\n"


def test_a_folder_of_the_user_from_the_environment(command, tmp_path, monkeypatch):
    write_conf(tmp_path / "site", "site/mine", OWN % "site")
    monkeypatch.setenv("DISTRAIN_CONF", f'["file://{tmp_path}/site"]')
    assert command(*DIGITS, "+site=mine")[0] is ExitCode.FINISHED
    assert STARTED[0].conf["vars"] == {"who": "site"}


def test_a_primary_config_of_the_user_shadows_ours(command, tmp_path):
    main = "defaults: [config, _self_]\nhydra: {searchpath: ['pkg://distrain.conf']}\n"
    write_conf(tmp_path / "conf", "mine", main)
    write_conf(tmp_path / "conf", "optim/sgd", "target: torch.optim.SGD\nlr: 42\ndampening: 3\n")
    argv = from_here(["--config-path", "conf", "--config-name", "mine", *DIGITS])
    code, _, err = command(*argv)
    assert code is ExitCode.FINISHED, err
    assert STARTED[0].conf["optim"]["dampening"] == 3


def test_a_config_path_is_relative_to_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = f"{tmp_path}/conf"
    assert from_here(["--config-path", "conf", "a=conf"]) == ["--config-path", here, "a=conf"]
    assert from_here(["--config-path=conf"]) == [f"--config-path={here}"]
    assert from_here(["-cp", "pkg://x"]) == ["-cp", "pkg://x"]


def test_multirun_may_stand_anywhere():
    assert from_here(["a=1", "-m", "b=1,2"]) == ["-m", "a=1", "b=1,2"]


def test_flags_may_stand_between_overrides(command, tmp_path):
    """As in `sbatch slurm/train.sbatch --config-dir conf +experiment=...`."""
    argv = [
        "a=1",
        "--config-dir",
        "conf",
        "+b=2",
        "--info",
        "defaults",
        "c=3",
        "--cfg=job",
        "-i",
        "d=4",
    ]
    flags = ["--config-dir", "conf", "--info", "defaults", "--cfg=job", "-i"]
    assert from_here(argv) == [*flags, "a=1", "+b=2", "c=3", "d=4"]
    write_conf(tmp_path / "conf", "vars/mine", "{}\n")
    argv = from_here(["seed=5", "--config-dir", str(tmp_path / "conf"), *DIGITS])
    code, _, err = command(*argv)
    assert code is ExitCode.FINISHED, err
    assert STARTED[0].conf["seed"] == 5


HEAD = "# @package _global_\n"
TRAINS = """
model: {_target_: my.Model}
data: {batch_size: 8, train: {_target_: my.Data}}
trainer: {max_iter: 5}
launch: {in_process: true}
"""
OWN_PARTS = """
optim: {target: torch.optim.NAdam, lr: 1e-3, weight_decay: 0.05}
schedule: {_target_: torch.optim.lr_scheduler.StepLR, step_size: 1000}
"""
MINE = ("--config-dir", "conf", "+experiment=mine")


def test_another_target_is_not_given_the_keywords_of_the_default(command, tmp_path):
    write_conf(tmp_path / "conf", "experiment/mine", HEAD + TRAINS + OWN_PARTS)
    assert command(*MINE) == (ExitCode.FINISHED, "", "")
    conf = STARTED[0].conf
    assert conf["schedule"] == {
        "_target_": "torch.optim.lr_scheduler.StepLR",
        "step_size": 1000,
    }
    assert "momentum" not in conf["optim"]
    assert (conf["optim"]["lr"], conf["optim"]["weight_decay_norm"]) == (0.001, 0.0)


def test_the_users_own_keywords_are_all_kept(command, tmp_path):
    own = OWN_PARTS.replace("lr: 1e-3", "lr: 1e-3, momentum: 0.9")
    write_conf(tmp_path / "conf", "experiment/mine", HEAD + TRAINS + own)
    assert command(*MINE, "schedule.warmup_iters=0")[0] is ExitCode.FINISHED
    assert STARTED[0].conf["optim"]["momentum"] == 0.9  # refused where the optimizer is built
    assert STARTED[0].conf["schedule"].keys() == {"_target_", "step_size", "warmup_iters"}


@pytest.mark.parametrize(
    ("argv", "has", "has_not"),
    [
        (("optim.target=torch.optim.NAdam",), {"lr"}, {"momentum", "nesterov"}),
        (("optim.target=torch.optim.RMSprop",), {"momentum"}, {"nesterov"}),
        (("optim=adamw",), {"betas"}, {"momentum", "nesterov"}),
        (("optim=adamw", "optim.target=torch.optim.Adam"), {"betas"}, {"momentum"}),
        (("optim.target=torch.optim.NAdam", "+optim.eps=1"), {"eps"}, {"momentum"}),
        ((), {"momentum", "nesterov"}, set()),
    ],
)
def test_another_optimizer_for_an_experiment_of_ours(command, argv, has, has_not):
    code, _, err = command(*DIGITS, *argv)
    assert (code, err) == (ExitCode.FINISHED, "")
    assert has <= STARTED[0].conf["optim"].keys()
    assert not has_not & STARTED[0].conf["optim"].keys()


def test_another_schedule_by_the_command_line(command):
    steps = "schedule._target_=torch.optim.lr_scheduler.StepLR"
    assert command(*DIGITS, steps, "+schedule.step_size=4")[0] is ExitCode.FINISHED
    assert STARTED[0].conf["schedule"].keys() == {"_target_", "step_size"}


def test_null_leaves_a_group_out(command, monkeypatch):
    argv = overrides.readable([*DIGITS, "optim=null", "schedule=null"])
    assert command(*argv)[0] is ExitCode.FINISHED
    assert (STARTED[0].conf["optim"], STARTED[0].conf["schedule"]) == (None, None)


def test_a_name_in_any_script_needs_no_quotes(command, tmp_path):
    argv = overrides.readable([*DIGITS, "run.name=日本語", "vars.x='é'", "+vars.y=[a]"])
    assert argv[2:] == ["run.name='日本語'", "vars.x='é'", "+vars.y=[a]"]
    assert command(*DIGITS, argv[2])[0] is ExitCode.FINISHED
    assert os.listdir(tmp_path / "runs") == ["日本語"]


@pytest.mark.parametrize("head", ["", "# a comment first\n# @package _global_\n"])
def test_a_file_without_a_package_is_one_line(command, tmp_path, head):
    write_conf(tmp_path / "conf", "experiment/mine", head + TRAINS)
    code, _, err = command(*MINE)
    assert code is ExitCode.BAD_CONFIG
    assert err == (
        f"distrain: experiment=mine: the keys of {tmp_path}/conf/experiment/mine.yaml are below "
        "experiment.; expected '# @package _global_' as its first line\n"
    )


@pytest.mark.parametrize("name", ["experiment/digits", "optim/sgd"])
def test_a_file_that_is_never_read_is_one_line(command, tmp_path, name):
    write_conf(tmp_path / "conf", name, HEAD + TRAINS)
    code, _, err = command("--config-dir", "conf", *DIGITS)
    assert code is ExitCode.BAD_CONFIG
    choice = name.replace("/", "=")
    assert err == (
        f"distrain: {choice}: {tmp_path}/conf/{name}.yaml is shadowed by distrain's own file of "
        "the same name; rename it\n"
    )
    assert os.listdir(tmp_path) == ["conf"]


def test_an_experiment_that_is_not_found_names_the_folders(command, tmp_path):
    assert "; --config-dir FOLDER adds your files" in command("+experiment=mine")[2]
    write_conf(tmp_path / "conf", "experiment/other", HEAD)
    assert f"; also searched: {tmp_path}/conf\n" in command(*MINE)[2]


# sweeps


def test_a_sweep_has_a_folder_for_each_run(command, tmp_path):
    code, _, err = command("-m", *DIGITS, "optim.lr=0.1,0.2", "seed=1,2", "trainer.max_iter=5")
    assert code is ExitCode.FINISHED
    names = [f"runs/digits/optim.lr={lr},seed={seed}" for lr in (0.1, 0.2) for seed in (1, 2)]
    assert run_names(tmp_path) == names
    assert [job.conf["optim"]["lr"] for job in STARTED] == [0.1, 0.1, 0.2, 0.2]
    assert [line.removeprefix("distrain: run ") for line in err.splitlines()] == [
        f"{tmp_path}/{name}" for name in names
    ]
    assert sorted(os.listdir(tmp_path)) == ["runs"]


def test_a_run_that_fails_does_not_end_the_sweep(command, tmp_path):
    code, _, err = command("-m", *DIGITS, "+vars.end=ok,config,fail,also")
    assert code is ExitCode.FAILED  # the worst of them
    assert len(STARTED) == 4
    assert run_names(tmp_path) == [f"runs/digits/vars.end={end}" for end in ("also", "fail", "ok")]
    assert "distrain: data.train: it is empty" in err


def test_a_value_that_is_wrong_does_not_end_the_sweep(command, tmp_path):
    code, _, err = command("-m", *DIGITS, "optim.lr=0.1,abc,0.2")
    assert code is ExitCode.BAD_CONFIG
    assert len(STARTED) == 2
    assert "distrain: optim.lr=abc: expected a number" in err


def test_who_stops_a_sweep_stops_all_of_it(command):
    code, _, _ = command("-m", *DIGITS, "+vars.end=ok,stop,never")
    assert code is ExitCode.STOPPED
    assert [job.conf["vars"]["end"] for job in STARTED] == ["ok", "stop"]


def test_a_crash_in_a_sweep_comes_last(command):
    with pytest.raises(KeyError):
        command("-m", *DIGITS, "+vars.end=crash,ok")
    assert len(STARTED) == 2


class Queue(Launcher):
    """A launcher that takes a whole sweep at once."""

    waits = False
    taken = []

    def start(self, job):
        raise AssertionError("one by one")

    def start_all(self, jobs):
        self.taken.append([Path(job.run_dir).name for job in jobs])
        for job in jobs:
            assert Path(job.run_dir, "run.yaml").exists()
        return ExitCode.FINISHED


def test_a_launcher_may_take_the_sweep_at_once(command):
    Queue.taken.clear()
    launch = ("launch=external", f"launch._target_={__name__}.Queue")
    code, _, err = command("-m", "+experiment=digits", *launch, "seed=1,2")
    assert code is ExitCode.FINISHED, err
    assert Queue.taken == [["seed=1", "seed=2"]]


def test_a_launcher_of_another_class_is_refused(command):
    code, _, err = command(
        "+experiment=digits", "launch=external", "launch._target_=types.SimpleNamespace"
    )
    assert code is ExitCode.BAD_CONFIG
    assert err == (
        "distrain: launch._target_=types.SimpleNamespace: expected a subclass of "
        "distrain.launch.Launcher\n"
    )


def test_folder_names():
    assert folder_name("optim.lr=0.1,seed=2") == "optim.lr=0.1,seed=2"
    assert folder_name("a/b=1").startswith("a_b=1-")
    assert folder_name("../x").startswith("_x-")
    assert folder_name("a b") != folder_name("a/b")
    assert len(folder_name("x" * 500)) < 130


def test_the_worst_code():
    finished, failed, bad, stopped = ExitCode
    assert worst([]) is finished
    assert worst([finished, stopped]) is stopped
    assert worst([bad, stopped, finished]) is bad
    assert worst([bad, failed, stopped]) is failed


# as a process


def test_torch_is_not_needed_to_say_no(tmp_path):
    script = """
import sys
from distrain.cli.command import Command
def run(*argv):
    sys.argv[1:] = argv
    try:
        return Command(argv).run()
    except SystemExit as left:
        return left.code
assert run("--help") == 0
assert run("+experiment=none") == 2
assert run("+experiment=digits", "optim.lr=abc") == 2
assert run("+experiment=digits", "resume=must") == 2
assert run("+experiment=digits", "launch.ranks=0") == 2
assert run("+experiment=digits", "--cfg", "job") == 0
slow = {"torch", "numpy", "tensorboard", "submitit", "rich"} & set(sys.modules)
assert not slow, slow
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_reader_that_leaves_is_no_mistake(tmp_path):
    shell = f"{sys.executable} -m distrain --help | head -1"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        shell, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""

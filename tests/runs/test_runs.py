"""python -m distrain.runs on runs that are real: running, finished, failed, killed."""

import json
import os
import pty
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from project import write_project

from distrain.runs.__main__ import run
from distrain.runs.records import last_rows, read
from distrain.runs.table import COLUMNS, fitted
from distrain.text import table

pytestmark = pytest.mark.ranks

ROOT = Path(__file__).parents[2]
CODE = '''
import os, time
import torch
from torch import nn
from distrain import HookBase


class Line(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        return torch.tensor([i / 32]), torch.tensor([i / 16])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x, y):
        return nn.functional.mse_loss(self.layer(x), y)

    def metrics(self, x, y):
        return {"error": (self.layer(x) - y).abs().squeeze(1)}


class Trouble(HookBase):
    """Waits in each step as PAUSE_S says; on rank 1 it may raise in step 12."""

    def __init__(self, what):
        self._what = what

    def after_step(self):
        time.sleep(float(os.environ.get("PAUSE_S", "0")))
        if self._what == "raise" and self.trainer.iter == 12 and self.trainer.where.rank == 1:
            raise ValueError("user code is wrong")
'''
CONF = """
# @package _global_
defaults: [{override /schedule: constant}]
model: {_target_: tiny.Net}
data: {batch_size: 8, train: {_target_: tiny.Line}, eval: {_target_: tiny.Line}}
optim: {lr: 0.1}
trainer: {max_iter: 40, window: 2}
hooks:
  checkpoint: {period: 10}
  trouble: {_target_: tiny.Trouble, what: nothing}
launch: {ranks: 2}
"""
GOOD, BAD = "sweep/hooks.trouble.what=nothing", "sweep/hooks.trouble.what=raise"


@dataclass
class Project:
    """A folder with runs in runs/."""

    folder: Path
    long: subprocess.Popen[str]

    def path(self, name: str) -> Path:
        return self.folder / "runs" / name


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def start(folder: Path, *argv: str, pause_s: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "distrain", "--config-dir", "conf", *argv, "+experiment=tiny"]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(PAUSE_S=str(pause_s)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def reaches(path: Path, iteration: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while read(path).iteration < iteration:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return runs of all kinds; the long one goes on until somebody stops it."""
    folder = tmp_path_factory.mktemp("project")
    write_project(folder, module="tiny", code=CODE, experiment="tiny", conf=CONF)
    processes = {
        "sweep": start(folder, "-m", "hooks.trouble.what=nothing,raise", "run.name=sweep"),
        "killed": start(
            *(folder, "run.name=killed", "trainer.max_iter=1000"),
            *("launch.in_process=true", "launch.ranks=null"),
            pause_s=0.1,
        ),
        "long": start(folder, "run.name=long", "trainer.max_iter=1000", pause_s=0.1),
    }
    try:
        reaches(folder / "runs/killed", 12, processes["killed"])
        processes["killed"].kill()
        said = processes["sweep"].communicate(timeout=200)[1]
        assert processes["sweep"].returncode == 1, said
        reaches(folder / "runs/long", 4, processes["long"])
        yield Project(folder, processes["long"])
    finally:
        for process in processes.values():
            process.kill()
            process.communicate(timeout=30)


@pytest.fixture
def runs(project, monkeypatch, capsys):
    """Return a function that runs the command line there; it returns code, stdout, stderr."""
    monkeypatch.chdir(project.folder)

    def runs(*argv):
        code = run(argv)
        return code, *capsys.readouterr()

    return runs


def by_name(text):
    return {each["name"]: each for each in json.loads(text)}


def test_the_states_of_all_runs(runs, project):
    code, out, err = runs("--json")
    assert (code, err) == (0, "")
    found = by_name(out)
    states = {name: each["state"] for name, each in found.items()}
    assert states == {"killed": "dead", "long": "running", GOOD: "finished", BAD: "failed"}
    good, bad, killed = found[GOOD], found[BAD], found["killed"]
    assert (good["iteration"], good["max_iter"], good["kept_iter"]) == (40, 40, 40)
    assert (good["ranks"], killed["ranks"], good["group"]) == (2, 1, "sweep")
    assert bad["kept_iter"] == 10
    assert 10 <= bad["iteration"] <= 12
    assert bad["why"].startswith("rank 1 failed: ValueError: user code is wrong (log: ")
    assert killed["why"] == f"its process on {os.uname().nodename} died without an exit record"
    rows = [json.loads(each) for each in (project.path(GOOD) / "metrics.jsonl").open()]
    assert good["values"]["loss"] == rows[-1]["loss"]
    assert good["values"]["eval/error"] == rows[-1]["eval/error"]
    assert 0 < good["goodput"] <= 1
    assert found["long"]["why"] == f"process {project.long.pid} on {os.uname().nodename}"
    assert 0 < found["long"]["eta_s"] < 1000
    assert good["eta_s"] is None


def test_the_table_is_plain_text_in_a_file(runs, project):
    code, out, _ = runs()
    assert code == 0
    header, killed, long, group, good, bad = out.splitlines()
    assert header.split() == [
        *("name", "state", "iteration", "loss", "eta", "ranks", "goodput", "job", "started", "seen")
    ]
    assert killed.split()[:2] == ["killed", "dead"]
    assert long.split()[:2] == ["long", "running"]
    assert group == "sweep/  1 finished, 1 failed"
    loss = read(project.path(GOOD)).rows[-1]["loss"]
    assert good.split()[:4] == ["hooks.trouble.what=nothing", "finished", "40/40", f"{loss:.4g}"]
    assert bad.split()[:2] == ["hooks.trouble.what=raise", "failed"]
    assert good.startswith("  hooks")
    assert "\x1b" not in out


def test_order_states_and_another_metric(runs):
    _, out, _ = runs("runs", "--sort", "iteration", "--reverse", "--metric", "eval/error")
    names = [line.split()[0] for line in out.splitlines()]
    sweep = names.index("sweep/")
    assert names[sweep : sweep + 3] == [
        *("sweep/", "hooks.trouble.what=nothing", "hooks.trouble.what=raise")
    ]
    assert out.splitlines()[0].split()[3] == "eval/error"
    _, out, _ = runs("--state", "failed,dead", "--json")
    assert set(by_name(out)) == {BAD, "killed"}
    assert runs("--state", "queued") == (0, "", "distrain.runs: no queued runs in runs\n")


@pytest.mark.parametrize("no_color", ["", "1"])
def test_the_table_in_a_terminal(project, no_color):
    primary, secondary = pty.openpty()
    env = environment(NO_COLOR=no_color, TERM="xterm-256color", COLUMNS="160")
    command = [sys.executable, "-m", "distrain.runs"]
    done = subprocess.run(command, cwd=project.folder, env=env, stdout=secondary, check=True)
    os.close(secondary)
    text = b""
    try:
        while data := os.read(primary, 1 << 16):
            text += data
    except OSError:  # Linux says so at the end
        pass
    os.close(primary)
    assert done.returncode == 0
    assert (b"\x1b[32mrunning" in text) == (not no_color)
    assert (b"\x1b[31mfailed" in text) == (not no_color)
    assert b"hooks.trouble.what=nothing" in text


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_narrow_terminal_keeps_names_and_whole_numbers(width):
    name = "sweeps/optim.lr=0.001,optim.weight_decay=0.05,seed=3"
    rows = [
        [*COLUMNS],
        [name, "preempted", "142000/10000000", "0.002985", "12:34:56", "16", "100%", "4711_3"]
        + ["2026-11-28 17:25", "37 min ago"],
        ["digits", "finished", "200/200", "0.665", "-", "2", "60%", "-", "-", "1 s ago"],
    ]
    cut, kept, left_out = fitted(rows, width)
    lines = table(cut).splitlines()
    assert max(map(len, lines)) <= width
    assert [COLUMNS[i] for i in kept][:4] == ["name", "state", "iteration", "metric"]
    assert len(kept) + len(left_out) == len(COLUMNS)
    for row, shown in zip(rows[1:], cut[1:], strict=True):
        assert shown[1:] == [row[i] for i in kept[1:]]
    assert cut[1][0].startswith(name[:7])
    assert cut[1][0].endswith(name[-7:])
    assert cut[2][0] == "digits"


def test_show_begins_its_logs_with_the_rank_that_failed(runs, project):
    code, out, _ = runs("show", BAD)
    assert code == 0
    title = out.splitlines()[0]
    assert title.startswith(f"runs/{BAD}: failed: rank 1 failed: ValueError: user code is wrong")
    first, *_ = [line for line in out.splitlines() if line.startswith("the end of ")]
    assert first == f"the end of runs/{BAD}/logs/rank_1.log"
    assert "\n  ValueError: user code is wrong\n" in out
    assert "\n  10: 2 ranks, 0.0 MB, 2" in out
    assert "\n      what: raise\n" in out  # the configuration
    assert "exit code 1 (rank 1 failed" in out
    assert "hooks.trouble.what=nothing,raise run.name=sweep" in out


def test_diff(runs):
    code, out, _ = runs("diff", GOOD, BAD)
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["hooks.trouble.what", "nothing", "raise"] in lines
    assert sum(len(line) == 3 and line[0].startswith("run.") for line in lines) == 0
    assert out.count("nothing") > 1  # in the names
    (loss,) = [line for line in lines if line and line[0] == "loss"]
    assert float(loss[3]) == pytest.approx(float(loss[2]) - float(loss[1]), rel=1e-2)
    assert "eval/error" not in [line[0] for line in lines if line]  # not shared
    assert "code: unknown, not in git" in out


def test_plot_draws_a_curve_a_run(runs, project, tmp_path):
    from PIL import Image

    out = tmp_path / "out.png"
    argv = ("--scalar", "loss", "--scalar", "eval/*", "-o", str(out), "--smooth", "3")
    code, said, err = runs("plot", GOOD, BAD, *argv)
    assert (code, err) == (0, "")
    assert said == f"{out}: loss, eval/error of 2 runs\n"
    pixels = np.asarray(Image.open(out).convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    assert width > 1.5 * height  # two pairs of axes
    left = pixels[:, : width // 2]
    for color in ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E)):  # the first two of matplotlib's
        assert (abs(left - color).sum(axis=2) < 30).sum() > 100, "a line a run"
    right = pixels[:, width // 2 :]
    assert (abs(right - (0x1F, 0x77, 0xB4)).sum(axis=2) < 30).sum() > 20
    assert (abs(right - (0xFF, 0x7F, 0x0E)).sum(axis=2) < 30).sum() == 0  # never evaluated


def test_plot_without_matplotlib_is_one_line(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = runs("plot", GOOD, "-o", "x.png")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.endswith('expected matplotlib.figure; pip install "distrain[plot]"\n')


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("none",), "none: no such folder; give the one that holds the runs"),
        (("show", "lung"), "lung: no such run; did you mean long?"),
        (("show", "what=raise"), f"what=raise: no such run; did you mean {BAD}"),
        (("show", "x", "--folder", "conf"), "x: no such run; no runs are in conf; --folder names"),
        (("show",), "the following arguments are required: RUN; see python -m distrain.runs show"),
        (("--sort", "size"), "--sort size: no such column; available: name, state, iteration, "),
        (("--state", "runing"), "--state runing: no such state; available: queued, running, "),
        (("plot", "long", "-o", "x.png", "--scalar", "lss"), "--scalar lss: in none of the runs; "),
        (("plot", "long", "-o", "x.xyz"), "-o x.xyz: Format 'xyz' is not supported"),
        (("plot", "long", "-o", "no/x.png"), "-o no/x.png: "),
        (("plot", "long", "-o", "x.png", "--smooth", "0"), "--smooth 0: expected at least 1 row"),
        (("show", "long", "--lines", "-1"), "--lines -1: expected at least 0; see python -m "),
        (("resume", "long"), "runs/long: it is running (process "),
    ],
)
def test_a_mistake_is_one_line(runs, project, argv, text):
    code, out, err = runs(*argv)
    assert (code, out) == (2, "")
    assert err.startswith(f"distrain.runs: {text}")
    assert err.count("\n") == 1
    assert not list(project.folder.glob("x.*"))


def test_nothing_to_stop(runs):
    said = f"runs/{GOOD}: nothing is running: it is finished at iteration 40 of 40 (40 saved)\n"
    assert runs("stop", GOOD) == (0, said, "")


def test_looking_needs_no_torch(project):
    script = """
import sys
from distrain.runs.__main__ import run
for argv in ([], ["--json"], ["show", "long"], ["diff", "long", "killed"], ["stop", "killed"]):
    assert run(argv) == 0, argv
assert run(["resume", "long"]) == 2
slow = {"torch", "numpy", "hydra", "omegaconf", "submitit", "rich", "matplotlib"} & set(sys.modules)
assert not slow, slow
"""
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=project.folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=60,
    )


def test_looking_does_not_disturb_the_one_who_holds_the_lock(project):
    path = project.path("long")
    before = (path / "lock").read_bytes()
    for _ in range(100):
        read(path)
    assert (path / "lock").read_bytes() == before
    assert project.long.poll() is None


def test_stop_and_resume(runs, project):
    """The last test here that needs the long run at work."""
    code, out, _ = runs("stop", "long")
    assert (code, project.long.wait(60)) == (0, 75)
    files = read(project.path("long"))
    done = files.iteration
    assert files.kept_iter == done
    assert out == f"runs/long: stopped at iteration {done} of 1000 ({done} saved)\n"
    resumed = subprocess.run(
        [sys.executable, "-m", "distrain.runs", "resume", "long", f"trainer.max_iter={done + 4}"],
        cwd=project.folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.startswith(
        "distrain.runs: python -m distrain --config-dir conf run.name=long +experiment=tiny "
        f"trainer.max_iter={done + 4} "
    )
    found = by_name(runs("--json")[1])["long"]
    assert (found["state"], found["iteration"]) == ("finished", done + 4)
    starts = read(project.path("long")).starts
    assert [each.code for each in starts] == [75, 0]


def test_a_tail_is_read_and_not_all(tmp_path):
    lines = [json.dumps({"iteration": i, "loss": 1 / (i + 1)}) for i in range(100_000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 100000, "lo')
    rows = last_rows(tmp_path)
    assert rows[-1] == {"iteration": 99_999, "loss": 1e-5}
    assert len(rows) < 3000
    assert [row["iteration"] for row in rows] == list(range(100_000 - len(rows), 100_000))


def test_a_metric_that_was_evaluated_long_ago_has_its_last_value(tmp_path, capsys):
    rows = [{"iteration": i, "loss": 0.5} for i in range(10_000)]
    rows[3]["eval/error"], rows[5]["eval/error"] = 0.25, 0.125
    (tmp_path / "a").mkdir()
    (tmp_path / "a/run.yaml").write_text("trainer: {max_iter: 20000}\n")
    (tmp_path / "a/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert run([str(tmp_path), "--metric", "eval/error"]) == 0
    assert "0.125" in capsys.readouterr().out
    assert run(["show", "a", "--folder", str(tmp_path), "--metric", "eval/error"]) == 0
    assert re.search(r"^  eval/error +0\.125$", capsys.readouterr().out, re.MULTILINE)


def test_a_metric_of_no_run_is_a_notice(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/run.yaml").write_text("trainer: {max_iter: 5}\n")
    argv = ["--metric", "eval/acuracy"]
    assert run([str(tmp_path), *argv]) == 0
    assert capsys.readouterr().err == ""  # it has no values yet
    (tmp_path / "a/metrics.jsonl").write_text('{"iteration": 1, "eval/accuracy": 0.5}\n')
    assert run([str(tmp_path), *argv]) == 0
    hint = "did you mean eval/accuracy?"
    expected = f"distrain.runs: --metric eval/acuracy: in none of the runs; {hint}\n"
    assert capsys.readouterr().err == expected
    assert run(["show", "a", "--folder", str(tmp_path), *argv]) == 0
    expected = f"distrain.runs: --metric eval/acuracy: not in this run; {hint}\n"
    assert capsys.readouterr().err == expected
    for silent in (["--metric", "eval/accuracy"], []):  # the default was not asked for
        assert run([str(tmp_path), *silent]) == 0
        assert capsys.readouterr().err == ""


def test_a_metric_that_was_not_chosen_is_not_looked_for(tmp_path, capsys, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/run.yaml").write_text("trainer: {max_iter: 5}\n")
    (tmp_path / "a/metrics.jsonl").write_text('{"iteration": 1, "loss_g": 0.5}\n')
    assert run(["show", "a", "--folder", str(tmp_path)]) == 0
    monkeypatch.setattr("distrain.runs.table.all_rows", None)  # it takes long for many runs
    assert run([str(tmp_path)]) == 0
    assert capsys.readouterr().err == ""


def test_a_lock_whose_process_is_gone_is_no_running_run(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/run.yaml").write_text("trainer: {max_iter: 5}\nlaunch: {ranks: 3}\n")
    holder = {"pid": 2**22 + 1, "host": os.uname().nodename}
    (tmp_path / "a/lock").write_text(json.dumps(holder))
    assert run([str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["state"], found["ranks"], found["started"]) == ("dead", 3, None)


def test_a_run_that_ends_while_it_is_looked_at_is_not_called_dead(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.yaml").write_text("trainer: {max_iter: 50}\n")
    began = {"argv": [], "time": "2026-01-01T00:00:00+00:00"}
    (folder / "command.json").write_text(json.dumps({"starts": [began]}))
    process = {"pid": 1, "host": "n1"}

    def holder(path):
        """At the second look the run ends after its files were read."""
        if found := looks.pop():
            return found
        (folder / "metrics.jsonl").write_text('{"iteration": 6, "loss": 1.0}\n')
        end = {"time": "2026-01-01T00:01:00+00:00", "code": 75, "why": ""}
        (folder / "command.json").write_text(json.dumps({"starts": [began | {"end": end}]}))
        looks.append(None)
        return None

    looks = [None, process]
    monkeypatch.setattr("distrain.runfolder.lock.holder", holder)
    for state, iteration in (("running", 0), ("stopped", 7)):
        assert run([str(tmp_path), "--json"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert (found["state"], found["iteration"]) == (state, iteration)

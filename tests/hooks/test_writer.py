"""PeriodicWriter: its writers come from the configuration, on rank 0 only; each gets all rows."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from ranks import run_ranks

from distrain import HookBase, TrainerBase
from distrain.cli.command import Command
from distrain.config.instantiate import build
from distrain.errors import ConfigError, ExitCode
from distrain.hooks import EvalHook, PeriodicWriter
from distrain.writers import JsonLinesWriter, Writer

CSV = {"_target_": "examples.csv_writer.CsvWriter", "names": ["square", "rare"]}


class Steps(TrainerBase):
    """Puts square each iteration, rare and an image in some."""

    def run_step(self):
        self.storage.put_scalar("square", float(self.iter**2), smoothing_hint=False)
        if self.iter % 4 == 0:
            self.storage.put_scalar("rare", float(self.iter), smoothing_hint=False)
            self.storage.put_image("picture", torch.zeros(2, 2))
            self.storage.put_histogram("values", torch.ones(3))


class Keeps(Writer):
    """Keeps its rows, and writes a file when it is built."""

    def __init__(self, folder=None):
        self.rows = []
        if folder:
            open(f"{folder}/built_by_{os.getpid()}", "w").close()

    def write(self, row):
        self.rows.append(row)


def node(*, writers, **more):
    """Return the node of conf/hooks/default.yaml with these writers."""
    return {
        "_target_": "distrain.hooks.PeriodicWriter",
        "_recursive_": False,
        "writers": writers,
        **more,
    }


def from_configuration(rank, folder):
    writers = {"keeps": {"_target_": "test_writer.Keeps", "folder": str(folder)}, "none": None}
    hook = build(node(writers=writers), "hooks.writer", run_dir=str(folder), conf={})
    Steps({"writer": hook}, window=2).train(0, 4)
    return os.getpid(), [row.iteration for w in hook._writers for row in w.rows]


@pytest.mark.ranks
def test_writers_are_built_on_rank_0_only(tmp_path):
    (pid, rows), (_, others) = run_ranks(from_configuration, 2, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"built_by_{pid}"]
    assert (rows, others) == ([1, 3, 3], [])


def test_a_second_hook_gets_the_images_too(tmp_path):
    first, second = Keeps(), Keeps()
    Steps([PeriodicWriter([first]), PeriodicWriter({"second": second})], window=2).train(0, 10)
    for writer in (first, second):
        assert [i for row in writer.rows for _, _, i in row.images] == [0, 4, 8]
        assert [i for row in writer.rows for _, _, i in row.histograms] == [0, 4, 8]


def test_rows_say_what_is_new():
    writer = Keeps()
    Steps([PeriodicWriter([writer])], window=2).train(0, 6)
    assert [row.new for row in writer.rows] == [
        {"square": (1.0, 1), "rare": (0.0, 0)},
        {"square": (9.0, 3)},
        {"square": (25.0, 5), "rare": (4.0, 4)},
        {},
    ]
    assert writer.rows[1].scalars["rare"] == (0.0, 0)


@pytest.mark.parametrize(
    ("writers", "message"),
    [
        ({"a": {"_target_": "no.such"}}, r"hooks\.writer\.writers\.a\._target_=no\.such"),
        ({"a": {**CSV, "nmaes": []}}, r"hooks\.writer\.writers\.a\.nmaes: .*did you mean names"),
        ({"a": {"_target_": "builtins.dict"}}, r"writers\.a=dict: expected a Writer"),
        (None, r"hooks\.writer\.run_dir=null: expected a folder"),
    ],
)
def test_a_wrong_writer_is_named_by_its_key(writers, message):
    with pytest.raises(ConfigError, match=message):
        build(node(writers=writers, run_dir=None), "hooks.writer")


def test_the_csv_writer_of_the_examples_joins_the_default_writers(tmp_path):
    path = tmp_path / "scalars.csv"
    for start, end in ((0, 8), (4, 10)):  # 4 to 7 are trained again
        hook = build(node(writers={"csv": CSV}), "hooks.writer", run_dir=str(tmp_path), conf={})
        hook.load_state_dict({"written": start, "evaluations": []})
        Steps({"writer": hook}, window=2).train(start, end)
    assert list(csv.reader(path.open())) == [
        ["iteration", "square", "rare"],
        *(["1", "1.0", "0.0"], ["3", "9.0", ""], ["5", "25.0", "4.0"], ["7", "49.0", ""]),
        ["9", "81.0", "8.0"],
    ]


def test_the_command_adds_one_and_leaves_one_out(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    settings = [
        "+experiment=digits", "trainer.max_iter=4", "trainer.window=2", "launch.in_process=true",
        "run.dir=run", "hooks.writer.writers.console=null",
        "+hooks.writer.writers.csv._target_=examples.csv_writer.CsvWriter",
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["distrain", *settings])
    assert Command(settings).run() == ExitCode.FINISHED
    assert "iter 1/4" not in capfd.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rows = list(csv.DictReader((tmp_path / "run/scalars.csv").open()))
    assert [float(row["loss"]) for row in rows[:2]] == [line["loss"] for line in lines[:2]]
    assert [*(tmp_path / "run").glob("events.out.tfevents.*")]


class Evaluates(HookBase):
    """Reports the number of iterations done, every `period` of them and at the start."""

    order = 60

    def __init__(self, period):
        self.period = period

    def before_train(self):
        if self.trainer.start_iter == 0:
            self.trainer.report_metrics({"eval/done": 0.0})

    def after_step(self):
        if self.trainer.iter_done % self.period == 0:
            self.trainer.report_metrics({"eval/done": float(self.trainer.iter_done)})


def test_metrics_that_are_tensors_are_written_too(tmp_path):
    evaluation = EvalHook(1, function=lambda: {"a": torch.tensor(0.5), "b": np.float32(2)})
    writer = PeriodicWriter([JsonLinesWriter()], run_dir=str(tmp_path))
    trainer = Steps([evaluation, writer], window=4)  # within it each evaluation has its own row
    trainer.train(0, 4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["eval/a"], line["eval/b"]) for line in lines] == [
        (iteration, 0.5, 2.0) for iteration in range(4)
    ]


def test_a_metric_of_several_numbers_is_refused():
    hook = EvalHook(1, function=lambda: {"a": torch.zeros(2)})
    with pytest.raises(ConfigError, match=r"eval/a=tensor\(.*\): expected one number"):
        Steps([hook]).train(0, 2)


class KeepsState(HookBase):
    """Keeps the state of the trainer after one iteration, as a checkpoint does."""

    order = 80

    def __init__(self, at):
        self.at, self.state = at, None

    def after_step(self):
        if self.trainer.iter_done == self.at:
            self.trainer.reduction.drain(self.trainer.iter)
            self.state = self.trainer.state_dict()


@pytest.mark.parametrize("killed", [None, 3, 6, 7, 8])
def test_each_evaluation_of_a_window_is_written_once(killed, tmp_path):
    state = None
    for start in (0,) if killed is None else (0, killed):
        writers = {"jsonl": {"_target_": "distrain.writers.JsonLinesWriter"}}
        hook = build(node(writers=writers), "hooks.writer", run_dir=str(tmp_path), conf={})
        keeps = KeepsState(killed)
        steps = Steps({"evaluates": Evaluates(3), "keeps": keeps, "writer": hook}, window=4)
        if state:
            steps.load_state_dict(state)
        steps.train(start, 10)
        state = keeps.state
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    shown = [(row["iteration"], row["eval/done"]) for row in rows if "eval/done" in row]
    assert shown == [(0, 0.0), (2, 3.0), (5, 6.0), (8, 9.0)]
    assert [row["iteration"] for row in rows if "square" in row] == [3, 7, 9]
    assert [row["iteration"] for row in rows] == sorted(row["iteration"] for row in rows)

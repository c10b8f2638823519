"""Traces of chosen steps: which, of which ranks, what is in them, and that others pay nothing."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from run_module import run_module
from torch import nn

from distrain import Trainer
from distrain.errors import ConfigError
from distrain.heartbeat import ObservedHeartbeat
from distrain.hooks import CallbackHook, StragglerWatch, TorchProfiler
from distrain.hooks.profiler import _Ranges

ROOT = Path(__file__).parents[2]
OURS = ("data", "forward", "backward", "optimizer", "hooks")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 1)

    def forward(self, batch):
        return self.net(batch).square().mean()


def train(rank, run_dir, *, max_iter=20, start_iter=0, accumulation=1, hooks=(), **keywords):
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hooks = [TorchProfiler(run_dir=str(run_dir), **keywords), *hooks]
    trainer = Trainer(
        model, optimizer, [torch.ones(4, 3)], hooks=hooks, window=5, accumulation=accumulation
    )
    trainer.train(start_iter, max_iter)
    return trainer


def names(run_dir):
    return sorted(path.name for path in Path(run_dir, "profile").iterdir())


def events(run_dir, name):
    trace = json.loads(Path(run_dir, "profile", name).read_text())
    return [event for event in trace["traceEvents"] if event.get("ph") == "X"]


def test_a_trace_holds_the_phases_of_its_steps(tmp_path):
    train(0, tmp_path, start=10, warmup=2, active=3)
    assert names(tmp_path) == ["rank_0.10.pt.trace.json"]
    found = events(tmp_path, "rank_0.10.pt.trace.json")
    counts = Counter(event["name"] for event in found if event["name"] in OURS)
    assert {name: counts[name] for name in OURS[:4]} == dict.fromkeys(OURS[:4], 3)
    assert counts["hooks"] in (2, 3)  # what comes after a step is in the next one's record
    spans = {
        name: sorted((e["ts"], e["ts"] + e["dur"]) for e in found if e["name"] == name)
        for name in OURS
    }
    for step in range(3):
        ends = [spans[name][step] for name in OURS[:4]]
        assert ends == sorted(ends)  # one after the other
        assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:], strict=False))
    [*_, (begin, end)] = spans["forward"]
    inner = [e for e in found if e["name"] == "aten::linear" and begin <= e["ts"] <= end]
    assert inner


def test_accumulation_has_a_range_a_forward(tmp_path):
    train(0, tmp_path, start=3, warmup=1, active=1, accumulation=2)
    found = Counter(event["name"] for event in events(tmp_path, "rank_0.3.pt.trace.json"))
    assert (found["data"], found["forward"], found["backward"]) == (2, 2, 2)
    assert found["optimizer"] == 1


def test_every_and_a_resumed_run(tmp_path):
    train(0, tmp_path / "a", start=2, warmup=1, active=2, every=6)
    assert names(tmp_path / "a") == [f"rank_0.{i}.pt.trace.json" for i in (14, 2, 8)]
    train(0, tmp_path / "b", start=2, warmup=1, active=2, every=6, start_iter=7)
    assert names(tmp_path / "b") == [f"rank_0.{i}.pt.trace.json" for i in (14, 8)]
    train(0, tmp_path / "c", start=2, start_iter=7)
    assert not (tmp_path / "c").exists()


def test_a_run_that_ends_in_a_profile_saves_what_it_has(tmp_path):
    trainer = train(0, tmp_path, start=10, warmup=2, active=30)
    found = Counter(event["name"] for event in events(tmp_path, "rank_0.10.pt.trace.json"))
    assert found["forward"] == 10
    assert not isinstance(trainer.pulse, ObservedHeartbeat)


def test_other_steps_make_no_range(tmp_path, monkeypatch):
    made, marked = [], []
    real = _Ranges.beat
    monkeypatch.setattr(_Ranges, "beat", lambda self, phase: (made.append(1), real(self, phase)))

    def look(trainer):
        if isinstance(trainer.pulse, ObservedHeartbeat):
            marked.append(trainer.iter)

    train(0, tmp_path, start=10, warmup=2, active=3, hooks=[CallbackHook(after_backward=look)])
    assert marked == [8, 9, 10, 11, 12]
    assert len(made) == 5 * 4 + 4  # data, forward, backward, optimizer; and hooks but for the last


def beside_the_straggler_watch(rank, run_dir):
    """Profile steps of which every second one is measured, too."""
    watch = StragglerWatch(every=2)
    trainer = train(rank, run_dir, start=3, warmup=1, active=4, ranks="all", hooks=[watch])
    measured = trainer.storage.history("straggler/own_s").values()
    return isinstance(trainer.pulse, ObservedHeartbeat), len(measured)


@pytest.mark.ranks
def test_two_hooks_hear_the_same_beats(tmp_path):
    for is_heard, measured in run_ranks(beside_the_straggler_watch, 2, tmp_path):
        assert not is_heard
        assert measured > 3
    found = Counter(event["name"] for event in events(tmp_path, "rank_1.3.pt.trace.json"))
    assert (found["data"], found["forward"], found["backward"], found["optimizer"]) == (4, 4, 4, 4)


def two(rank, run_dir, ranks):
    train(rank, run_dir, start=2, warmup=1, active=1, max_iter=6, ranks=ranks)


@pytest.mark.ranks
def test_chosen_ranks(tmp_path):
    run_ranks(two, 2, tmp_path / "one", [1])
    run_ranks(two, 2, tmp_path / "all", "all")
    assert names(tmp_path / "one") == ["rank_1.2.pt.trace.json"]
    assert names(tmp_path / "all") == [f"rank_{rank}.2.pt.trace.json" for rank in (0, 1)]


def test_a_folder_that_cannot_be_written_does_not_end_training(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file in its place")
    assert train(0, tmp_path, start=2).iter_done == 20


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"start": 1}, "start=1: expected an integer >= 2"),
        ({"active": 0}, "active=0"),
        ({"warmup": -1}, "warmup=-1"),
        ({"every": 4}, "every=4: expected an integer >= 5"),
        ({"ranks": "0"}, "ranks=0: expected a list"),
    ],
)
def test_wrong_arguments(keywords, text):
    with pytest.raises(ConfigError, match=text):
        TorchProfiler(run_dir=".", **keywords)


def test_the_command_takes_the_hooks_by_their_files(tmp_path):
    words = ["+experiment=digits", "trainer.max_iter=6", "trainer.window=3"]
    words += ["hooks=[default,throughput,memory,profiler]", "hooks.profiler.start=2"]
    done = run_module("distrain", *words, "launch.in_process=true", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "digits"
    assert names(run) == ["rank_0.2.pt.trace.json"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"perf/samples_per_s", "perf/tflops_per_rank", "memory/host_rss_mib"} <= rows[-1].keys()

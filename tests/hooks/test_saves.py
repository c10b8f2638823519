"""Checkpoints by time, and the best few by a metric."""

import itertools
import json
from types import SimpleNamespace

import pytest
from checkpoint_cases import InlineStore, best_of, iterations_in
from ranks import run_ranks
from resume_cases import conf_of, differing, state_of, train

from distrain import TrainerBase
from distrain.errors import ConfigError, ExitCode
from distrain.hooks import BestCheckpointer, EvalHook, PeriodicCheckpointer, checkpoint

ITERS = 40


def saved_by_time(rank, folder):
    # a second per look of rank 0 at its clock; the clock of others does not count
    ticks = itertools.count() if rank == 0 else itertools.repeat(1e9)
    checkpoint.time = SimpleNamespace(monotonic=lambda: next(ticks))
    late = conf_of(iters=ITERS, period=None, workers=2)
    late["hooks"]["checkpoint"]["every"] = "10s"
    late["checkpoint"] = {"keep_last": 100}
    assert train(late, folder / "late")[0] == ExitCode.FINISHED
    assert train(conf_of(iters=ITERS, period=None), folder / "never")[0] == ExitCode.FINISHED
    return [state_of(folder / name, ITERS) for name in ("late", "never")] if rank == 0 else None


@pytest.mark.usefixtures("short_windows")
def test_saves_by_time_are_agreed_on_and_change_no_bit(tmp_path):
    states = run_ranks(saved_by_time, 2, tmp_path)[0]
    saved = iterations_in(tmp_path / "late" / "checkpoints")
    assert saved[-1] == ITERS
    gaps = [b - a for a, b in itertools.pairwise([0, *saved[:-1]])]
    assert len(gaps) in (2, 3), saved
    assert all(10 <= gap <= 16 for gap in gaps), saved
    assert not differing(*states)


def test_a_mistake_in_the_time_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^every=often: expected a duration, as 15m, 2h30m or"):
        PeriodicCheckpointer(every="often", checkpoints=InlineStore(tmp_path))


class Steps(TrainerBase):
    def run_step(self):
        pass


VALUES = [0.3, 0.9, 0.5, 0.5, 0.1, 0.7, 0.2]  # after 10, 20, ... 70


def run(folder, *, start=0, iters=70, mode="max", state=None, keep=3, stop_at=None):
    store = InlineStore(folder / "checkpoints", keep_last=1)
    values = iter(VALUES[start // 10 :])
    best = BestCheckpointer("eval/score", mode=mode, keep=keep, checkpoints=store)
    hooks = {
        "checkpoint": PeriodicCheckpointer(None, checkpoints=store),
        "eval": EvalHook(10, function=lambda: {"score": next(values)}),
        "best": best,
    }
    trainer = Steps(hooks, window=10)
    if state is not None:
        trainer.load_state_dict(state)
    trainer.train(start, iters)
    return store


@pytest.mark.parametrize(("mode", "top"), [("max", [20, 60, 30]), ("min", [50, 70, 10])])
def test_the_best_few_are_kept(tmp_path, mode, top):
    store = run(tmp_path, mode=mode)
    assert iterations_in(store.folder) == sorted({*top, 70})
    text = json.loads((store.folder / "best.json").read_text())
    assert text["iteration"] == top[0]
    entries = text["metrics"]["eval/score"]["top"]
    assert entries == [{"iteration": i, "metric": VALUES[i // 10 - 1]} for i in top]
    assert best_of(store) == {"eval/score": (top[0], VALUES[top[0] // 10 - 1])}


def test_a_resumed_run_keeps_the_same(tmp_path):
    run(tmp_path / "straight")
    store = run(tmp_path / "broken", iters=30)
    # without the iterations after the checkpoint: it is of iteration 30, with 20, 30 and 10 as best
    assert iterations_in(store.folder) == [10, 20, 30]
    state = {"hooks": {}, "early_stop": 0, **store.load(30)}
    run(tmp_path / "broken", start=30, state=state)
    stores = [InlineStore(tmp_path / name / "checkpoints") for name in ("straight", "broken")]
    for each in stores:
        assert iterations_in(each.folder) == [20, 30, 60, 70]
    assert best_of(stores[0]) == best_of(stores[1])


def test_one_is_kept_as_before(tmp_path):
    store = run(tmp_path, keep=1)
    assert iterations_in(store.folder) == [20, 70]
    assert json.loads((store.folder / "best.json").read_text()) == {
        **{"iteration": 20, "metric": 0.9},
        "metrics": {"eval/score": {"iteration": 20, "metric": 0.9}},
    }

"""The end of a run: killed between any two of its last acts, it ends as one that was left alone."""

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
from checkpoint_cases import InlineStore
from ranks import run_ranks
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from distrain import HookBase, TrainerBase
from distrain.checkpoint.store import CheckpointStore
from distrain.errors import ExitCode
from distrain.events.storage import EventStorage
from distrain.hooks import BestCheckpointer, EvalHook, PeriodicCheckpointer, PeriodicWriter
from distrain.job.outcome import conclude
from distrain.writers import Writer

pytestmark = pytest.mark.ranks

ITERS, WINDOW, PERIOD = 10, 4, 3  # checkpoints 3, 6, 9 and 10; rows of iterations 3, 7 and 9
END = "_hparams_/session_end_info"


class Steps(TrainerBase):
    def run_step(self):
        self.storage.put_scalar("square", float(self.iter**2), smoothing_hint=False)


class LateWriter(PeriodicWriter):
    """The guard switched off: it writes its last row behind the final checkpoint."""

    order_at_end = None


class Kill(HookBase):
    def __init__(self, at):
        self.order_at_end = at

    def after_train(self):
        os.kill(os.getpid(), signal.SIGKILL)


def train(rank, folder, *, writer=PeriodicWriter, kill_at=None, iters=ITERS):
    """Go on from the newest checkpoint; return the iteration that it is of."""
    checkpoints = InlineStore(folder / "checkpoints")
    newest = checkpoints.newest_valid()
    trainer = Steps(
        {
            "writer": writer(run_dir=str(folder), conf={"lr": 0.1}),
            "checkpoint": PeriodicCheckpointer(PERIOD, checkpoints=checkpoints),
        },
        window=WINDOW,
    )
    if kill_at is not None:
        trainer.register_hooks({"kill": Kill(kill_at)})
    start = 0
    if newest is not None:
        start = newest.iteration
        trainer.load_state_dict(checkpoints.load(newest.path))
    if start < iters or (newest is not None and newest.is_end_left):
        trainer.train(start, iters)
    return start


def shown(folder):
    """Return the lines of metrics.jsonl, and the points of each curve and of the run's end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(folder), {"tensors": 0}).Reload()
    curves = {
        tag: [(e.step, e.tensor_proto.float_val[0]) for e in events.Tensors(tag)]
        for tag in events.PluginTagToContent("scalars")
        if events.Tensors(tag)
    }
    tags = events.Tags()["tensors"]
    return lines, curves, [event.step for event in events.Tensors(END)] if END in tags else []


QUIET = (
    [{"iteration": 3, "square": 9.0}, {"iteration": 7, "square": 49.0}]
    + [{"iteration": 9, "square": 81.0}],
    {"square": [(3, 9.0), (7, 49.0), (9, 81.0)]},
    [9],
)


@pytest.mark.parametrize(
    ("kill_at", "resumed_at"),
    [
        (None, 10),
        (74, 10),  # all but the last row and the checkpoint: the trained state is saved
        (76, 10),  # between the last row and the final checkpoint
        (81, 10),  # behind both
    ],
)
def test_killed_at_its_end_a_run_has_no_gap_and_nothing_twice(tmp_path, kill_at, resumed_at):
    if kill_at is None:
        run_ranks(train, 1, tmp_path)
    else:
        with pytest.raises(RuntimeError, match="exit code -9"):
            run_ranks(train, 1, tmp_path, kill_at=kill_at)
    assert run_ranks(train, 1, tmp_path) == [resumed_at]
    assert shown(tmp_path) == QUIET


def test_rows_behind_the_final_checkpoint_would_be_lost(tmp_path):
    with pytest.raises(RuntimeError, match="exit code -9"):
        run_ranks(train, 1, tmp_path, writer=LateWriter, kill_at=81)
    assert run_ranks(train, 1, tmp_path, writer=LateWriter) == [10]
    lines, curves, ends = shown(tmp_path)
    assert [line["iteration"] for line in lines] == [3, 7]
    assert curves == {"square": [(3, 9.0), (7, 49.0)]}
    assert ends == []


def test_a_longer_run_takes_the_end_back(tmp_path):
    run_ranks(train, 1, tmp_path)
    assert run_ranks(train, 1, tmp_path, iters=13) == [10]
    lines, curves, ends = shown(tmp_path)
    assert [line["iteration"] for line in lines] == [3, 7, 11, 12]
    assert curves["square"][-1] == (12, 144.0)
    assert ends == [12]


class Broken(PeriodicWriter):
    def _finish_run(self):
        raise ValueError("broken")


class Unguarded(Broken):
    def _write_end(self):
        if self._writer is not None:
            self._finish_run()


def test_a_writer_that_fails_at_its_end_does_not_prevent_the_final_checkpoint(tmp_path):
    assert run_ranks(train, 3, tmp_path / "a", writer=Broken) == [0, 0, 0]
    assert CheckpointStore(tmp_path / "a" / "checkpoints").newest_valid().iteration == ITERS
    assert [line["iteration"] for line in shown(tmp_path / "a")[0]] == [3, 7, 9]
    with pytest.raises(ValueError, match="broken"):  # without the guard: the others wait for it
        run_ranks(train, 3, tmp_path / "b", writer=Unguarded)
    assert CheckpointStore(tmp_path / "b" / "checkpoints").newest_valid().iteration == 9


class FinalEvaluation(EvalHook):
    """Puts 7.0 as eval/score; the first time it is killed, or raises, if told so."""

    def __init__(self, harm=None, period=None):
        super().__init__(period, function=self.score)
        self.harm = harm

    def score(self):
        if self.harm == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.harm == "raise":
            raise ValueError("a typo in metrics()")
        return {"score": 7.0}


class StopAt(HookBase):
    def __init__(self, iteration):
        self.iteration = iteration

    def after_step(self):
        if self.trainer.iter_done >= self.iteration:
            self.trainer.storage.early_stop = True


class Count(HookBase):
    order = 10

    def __init__(self, seen):
        self.seen = seen

    def after_step(self):
        self.seen.append(self.trainer.iter)


def evaluated(
    rank,
    folder,
    *,
    harm=None,
    iters=ITERS,
    stop_at=None,
    seen=None,
    keep_last=3,
    period=PERIOD,
):
    """Go on from the newest checkpoint, with evaluation, statistics of it and a best checkpoint."""
    store = InlineStore(folder / "checkpoints", keep_last=keep_last)
    newest = store.newest_valid()
    hooks = {
        "writer": PeriodicWriter(run_dir=str(folder)),
        "eval": FinalEvaluation(harm),
        "best": BestCheckpointer("eval/score", checkpoints=store),
        "checkpoint": PeriodicCheckpointer(period, checkpoints=store),
        "count": Count([] if seen is None else seen),
    }
    if stop_at:
        hooks["stop"] = StopAt(stop_at)
    trainer = Steps(hooks, window=WINDOW)
    start = 0
    if newest is not None:
        start = newest.iteration
        trainer.load_state_dict(store.load(newest.path))
    if start < iters or newest.is_end_left:
        trainer.train(start, iters)
    done = trainer.hooks["count"].seen
    return newest and (start, newest.is_end_left), done


def left_behind(folder):
    names = sorted(p.name for p in (folder / "checkpoints").iterdir())
    state = CheckpointStore(folder / "checkpoints").load(int(names[-2][5:]))
    del state["rng"]
    return names, shown(folder), repr(state)


@pytest.mark.parametrize("harm", ["kill", "raise"])
def test_an_early_stop_at_a_checkpoint_keeps_its_final_evaluation(tmp_path, harm):
    quiet, harmed = tmp_path / "quiet", tmp_path / "harmed"
    settings = {"stop_at": 8, "period": 4}
    assert run_ranks(evaluated, 1, quiet, **settings) == [(None, list(range(8)))]
    with pytest.raises((RuntimeError, ValueError)):
        run_ranks(evaluated, 1, harmed, harm=harm, **settings)
    assert run_ranks(evaluated, 1, harmed, **settings) == [((8, True), [])]
    assert left_behind(harmed) == left_behind(quiet)
    assert "eval/score" in CheckpointStore(quiet / "checkpoints").load(8)["histories"]


@pytest.mark.parametrize("iters", [10, 12])  # 12: the last iteration ends a window
@pytest.mark.parametrize("stop_at", [None, 8])
@pytest.mark.parametrize("harm", ["kill", "raise"])
def test_the_trained_state_is_saved_before_the_final_evaluation(tmp_path, harm, stop_at, iters):
    """Straight, and killed or failed in the final evaluation, a run leaves the same."""
    quiet, harmed = tmp_path / "quiet", tmp_path / "harmed"
    settings = {"iters": iters, "stop_at": stop_at}
    end = stop_at or iters
    assert run_ranks(evaluated, 1, quiet, **settings) == [(None, list(range(end)))]
    error, text = (RuntimeError, "exit code -9") if harm == "kill" else (ValueError, "a typo")
    for _ in range(2):  # the second time nothing is trained
        with pytest.raises(error, match=text):
            run_ranks(evaluated, 1, harmed, harm=harm, **settings)
        assert f"iter_{end:010d}.trained" in os.listdir(harmed / "checkpoints")
        assert f"iter_{end:010d}" not in os.listdir(harmed / "checkpoints")
    assert run_ranks(evaluated, 1, harmed, **settings) == [((end, True), [])]
    assert left_behind(harmed) == left_behind(quiet)
    names, (lines, curves, _), _ = left_behind(quiet)
    kept = [3, 6, 9, 12] if iters == 12 and not stop_at else [3, 6, 9, 10]
    kept = [3, 6, 8] if stop_at else kept
    assert names == ["best.json", *(f"iter_{i:010d}" for i in kept[-3:]), "run_id"]
    assert curves["eval/score"] == [(end - 1, 7.0)]
    assert [line["iteration"] for line in lines].count(end - 1) == 1


def test_a_longer_run_goes_on_from_a_trained_state(tmp_path):
    with pytest.raises(ValueError, match="a typo"):
        run_ranks(evaluated, 1, tmp_path, harm="raise")
    assert run_ranks(evaluated, 1, tmp_path, iters=13) == [((10, True), [10, 11, 12])]
    assert "iter_0000000010.trained" not in os.listdir(tmp_path / "checkpoints")


def test_nothing_is_saved_twice_where_the_end_only_closes(tmp_path, monkeypatch):
    saved = []
    real = CheckpointStore.save
    monkeypatch.setattr(
        CheckpointStore, "save", lambda s, i, *a, **k: saved.append(i) or real(s, i, *a, **k)
    )
    train(0, tmp_path)
    assert saved == [3, 6, 9, 10]


class Slow(Writer):
    def __init__(self):
        self.rows = []

    def write(self, row):
        time.sleep(0.05)
        self.rows.append(row.iteration)


def test_the_rows_are_written_before_the_trained_state_is_saved(tmp_path):
    writer, seen = Slow(), []
    checkpoints = InlineStore(tmp_path / "checkpoints")
    hooks = {
        "writer": PeriodicWriter([writer]),
        "eval": EvalHook(function=lambda: seen.extend(writer.rows) or {}),
        "checkpoint": PeriodicCheckpointer(checkpoints=checkpoints),
    }
    Steps(hooks, window=1).train(0, 6)
    assert seen == [0, 1, 2, 3, 4]  # the last row waits for what is evaluated here


def test_the_last_line_tells_the_loss_of_the_evaluation_from_that_of_training(caplog):
    caplog.set_level("INFO")
    storage = EventStorage(0)
    storage.put_scalars(loss=0.5, smoothing_hint=False)
    for name in ("eval/loss", "eval/score"):
        storage.put_scalar(name, 0.25, smoothing_hint=False)
    storage.step()
    trainer = SimpleNamespace(
        iter_done=1, start_iter=0, max_iter=1, ends_only=False, storage=storage, window=4
    )
    saved = SimpleNamespace(last_saved=1)
    conclude(trainer, ExitCode.FINISHED, "runs/a", saved, may_be_unsaved=False)
    [line] = [r.message for r in caplog.records if "finished" in r.message]
    assert line == "finished: 1 of 1 iterations  loss 0.5  eval/loss 0.25  score 0.25"

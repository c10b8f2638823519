"""The end of a run: killed between any two of its last acts, it ends as one that was left alone."""

import json
import os
import signal

import pytest
from ranks import run_ranks
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from distrain import HookBase, TrainerBase
from distrain.checkpoint import CheckpointStore
from distrain.hooks import PeriodicCheckpointer, PeriodicWriter

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
    checkpoints = CheckpointStore(folder / "checkpoints", background=False)
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
        trainer.load_state_dict(checkpoints.load(start))
    if start < iters:
        trainer.train(start, iters)
    return start


def shown(folder):
    """Return the lines of metrics.jsonl, and the points of each curve and of the run's end."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(folder / "tensorboard"), {"tensors": 0}).Reload()
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
    {"square": [(3, 9.0), (7, 49.0), (9, 81.0)], "final/square": [(9, 81.0)]},
    [9],
)


@pytest.mark.parametrize(
    ("kill_at", "resumed_at"),
    [
        (None, 10),
        (74, 9),  # all but the last row and the checkpoint
        (76, 9),  # between the last row and the final checkpoint
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
    assert curves["final/square"] == [(12, 144.0)]
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

"""One of four ranks is made slow, in one way after the other, and is named with the cause."""

import logging
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from distrain import HookBase, Trainer
from distrain.errors import ConfigError
from distrain.events import reduction
from distrain.heartbeat import Phase
from distrain.hooks import StragglerWatch, straggler
from distrain.hooks.straggler import _Clock

SLOW_S = 0.06


class Hand:
    """The clock of a rank, moved by hand: no load and no pace of the machine reaches a verdict."""

    def __init__(self):
        self.now_s = 0.0

    def perf_counter(self):
        return self.now_s

    def wait(self, seconds):
        self.now_s += seconds

    def meet(self):
        # in backward every rank waits for the slowest, whose clock is ahead
        latest_s = torch.tensor(self.now_s, dtype=torch.float64)
        dist.all_reduce(latest_s, dist.ReduceOp.MAX)
        self.now_s = latest_s.item()


class Model(nn.Module):
    def __init__(self, hand, slow_s):
        super().__init__()
        self.line, self.hand, self.slow_s = nn.Linear(3, 1), hand, slow_s

    def forward(self, batch):
        self.hand.wait(self.slow_s)
        return self.line(batch).square().mean()


class Slow(HookBase):
    def __init__(self, hand, slow_s):
        self.hand, self.slow_s = hand, slow_s

    def after_backward(self):
        if dist.is_initialized():
            self.hand.meet()

    def after_step(self):
        self.hand.wait(self.slow_s)


class Data:
    def __init__(self, hand, slow_s):
        self.hand, self.slow_s = hand, slow_s

    def __iter__(self):
        while True:
            self.hand.wait(self.slow_s)
            yield torch.ones(2, 3)


def train(rank, slow_rank, where, share=0.1):
    torch.manual_seed(0)
    hand = Hand()
    slow = {
        key: SLOW_S * (rank == slow_rank and key == where) for key in ("data", "forward", "hooks")
    }
    model = Model(hand, slow["forward"])
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("distrain").addHandler(handler)
    with mock.patch.object(straggler, "time", hand), mock.patch.object(reduction, "time", hand):
        trainer = Trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.01),
            Data(hand, slow["data"]),
            hooks=[StragglerWatch(every=2, patience=3, share=share), Slow(hand, slow["hooks"])],
            window=4,
        )
        trainer.train(0, 48)  # the first windows are those of warming up
    histories = trainer.storage.histories()
    latest = {name: h.latest() for name, h in histories.items() if name.startswith("straggler/")}
    return heard, latest, len(histories["straggler/own_s"].values()) if latest else 0


@pytest.mark.ranks
@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize(
    ("where", "words"),
    [("data", "waiting for data"), ("forward", "in forward"), ("hooks", "in hooks")],
)
def test_a_slow_rank_is_named_with_its_cause(where, words):
    (heard, latest, measured), *others = run_ranks(train, 4, 2, where)
    assert not any(messages for messages, *_ in others)
    assert len(heard) == 1, heard
    assert heard[0].startswith("the other ranks wait for rank 2 (")
    assert f", {words}; in 3 windows in a row" in heard[0]
    assert latest["straggler/slowest_rank"] == 2
    assert latest["straggler/lost_s"] == pytest.approx(SLOW_S)
    # three of four ranks wait for it in backward
    assert latest["straggler/backward_s"] == pytest.approx(0.75 * SLOW_S)
    assert measured == 23


@pytest.mark.ranks
@pytest.mark.usefixtures("short_windows")
@pytest.mark.parametrize(("slow_rank", "share"), [(-1, 0.1), (1, 1.1)])
def test_ranks_that_differ_by_less_than_a_share_of_a_step_are_not_named(slow_rank, share):
    for heard, latest, _ in run_ranks(train, 2, slow_rank, "data", share):
        assert not heard
        assert "straggler/own_s" in latest


def test_one_rank_is_not_measured():
    heard, latest, _ = train(0, 0, "forward")
    assert not heard
    assert not latest


def test_the_clock_adds_up_the_phases(monkeypatch):
    now = iter([10.0, 11.0, 13.0, 13.5, 16.0, 20.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    clock = _Clock(on_gpu=False)
    assert clock.read() is None
    clock.start()  # accumulation: data and forward twice
    for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.DATA, Phase.FORWARD, Phase.OPTIMIZER):
        clock.beat(phase)
    assert clock.read() == {"data": 1.0 + 2.5, "forward": 2.0 + 4.0, "backward": 0.5}
    assert clock.read() is None


@pytest.mark.parametrize(
    ("keywords", "message"),
    [({"every": 1}, "every=1"), ({"patience": 0}, "patience=0"), ({"share": 0}, "share=0")],
)
def test_what_is_out_of_range_is_named(keywords, message):
    with pytest.raises(ConfigError, match=message):
        StragglerWatch(**keywords)

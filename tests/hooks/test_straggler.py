"""One of four ranks is made slow, in one way after the other, and is named with the cause."""

import logging
import os
import time

import pytest
import torch
from ranks import run_ranks
from torch import nn

from distrain import HookBase, Trainer
from distrain.errors import ConfigError
from distrain.heartbeat import Phase
from distrain.hooks import StragglerWatch
from distrain.hooks.straggler import _Clock

# under `make test-clock` a sleep lasts as long as without: what it is compared with is real work
SLOW_S = 0.06 * float(os.environ.get("TEST_CLOCK") or "1")


class Model(nn.Module):
    def __init__(self, sleep_s):
        super().__init__()
        self.line, self.sleep_s = nn.Linear(3, 1), sleep_s

    def forward(self, batch):
        time.sleep(self.sleep_s)
        return self.line(batch).square().mean()


class Sleeps(HookBase):
    def __init__(self, sleep_s):
        self.sleep_s = sleep_s

    def after_step(self):
        time.sleep(self.sleep_s)


class Data:
    def __init__(self, sleep_s):
        self.sleep_s = sleep_s

    def __iter__(self):
        while True:
            time.sleep(self.sleep_s)
            yield torch.ones(2, 3)


def train(rank, slow_rank, where):
    torch.manual_seed(0)
    slow = {
        key: SLOW_S * (rank == slow_rank and key == where) for key in ("data", "forward", "hooks")
    }
    model = Model(slow["forward"])
    watch = StragglerWatch(every=2, patience=3)
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("distrain").addHandler(handler)
    trainer = Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        Data(slow["data"]),
        hooks=[watch, Sleeps(slow["hooks"])],
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
    assert latest["straggler/lost_s"] > SLOW_S / 4  # three of four ranks lose it
    assert latest["straggler/backward_s"] > SLOW_S / 4  # in which they wait
    assert measured == 23


@pytest.mark.ranks
@pytest.mark.usefixtures("short_windows")
def test_equal_ranks_are_not_named():
    # so unequal that no machine's moods reach it: nobody is slow by three times the step
    for heard, latest, _ in run_ranks(watch_patiently, 2):
        assert not heard
        assert "straggler/own_s" in latest


def watch_patiently(rank):
    StragglerWatch.__init__.__kwdefaults__ |= {"share": 3.0}
    return train(rank, -1, "data")


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

"""A run of a plain DataLoader or another iterable continues at the batch where it stopped."""

import itertools
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from resume_cases import Images, differing, interrupted_and_straight
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from distrain.data.epochs import EpochLoader
from distrain.errors import ConfigError

HERE = __name__


class Part(IterableDataset):
    """The samples of this rank and loader process, in another order in each epoch, with a state."""

    def __init__(self, num=29):
        self.images, self.epoch, self.next = Images(num, noise=0), 0, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        worker = get_worker_info()
        num, number = (worker.num_workers, worker.id) if worker else (1, 0)
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        order = torch.randperm(29, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        mine = order[rank * num + number :: ranks * num]
        while self.next < len(mine):
            self.next += 1
            yield self.images[mine[self.next - 1]]
        self.next = 0

    def state_dict(self):
        return {"next": self.next, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.next, self.epoch = state["next"], state["epoch"]


def shuffled(workers):
    return DataLoader(Images(noise=0), batch_size=3, shuffle=True, num_workers=workers)


def shuffled_in(batch_size, workers, **keywords):
    return DataLoader(
        Images(noise=0), batch_size=batch_size, shuffle=True, num_workers=workers, **keywords
    )


def persistent(batch_size):
    return shuffled_in(batch_size, 1, persistent_workers=True)


def generated(batch_size):
    return shuffled_in(batch_size, 0, generator=torch.Generator().manual_seed(3))


def persistent_and_generated(batch_size):
    generator = torch.Generator().manual_seed(3)
    return shuffled_in(batch_size, 1, persistent_workers=True, generator=generator)


def stateful_and_generated(batch_size):
    generator = torch.Generator().manual_seed(3)
    return StatefulDataLoader(
        Images(noise=0), batch_size=batch_size, shuffle=True, generator=generator
    )


def stateful_and_sampled(batch_size):
    images = Images(noise=0)
    return StatefulDataLoader(images, batch_size=batch_size, sampler=RandomSampler(images))


class Drawn(Sampler):
    """An order that NumPy and Python draw."""

    def __len__(self):
        return 29

    def __iter__(self):
        order = np.random.permutation(29).tolist()
        random.shuffle(order)
        return iter(order)


def drawn(workers):
    return DataLoader(Images(noise=0), batch_size=3, sampler=Drawn(), num_workers=workers)


def stateful(workers):
    return StatefulDataLoader(Part(), batch_size=3, num_workers=workers, drop_last=True)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    ("make", "workers"),
    [("shuffled", 2), ("shuffled", 0), ("drawn", 0), ("drawn", 2), ("stateful", 2)],
)
def test_interrupted_is_straight_bit_for_bit(tmp_path, world_size, make, workers):
    loader = {"_target_": f"{HERE}.{make}", "workers": workers}
    both = run_ranks(
        interrupted_and_straight, world_size, tmp_path, data={"train": None, "loader": loader}
    )[0]
    assert differing(*both) == []
    assert len(both[1]["stream"]["ranks"]) == world_size


@pytest.mark.parametrize("batch_size", [8, 6])  # iteration 5 is in the second epoch, or ends one
@pytest.mark.parametrize(
    "make",
    [
        *("persistent", "generated", "persistent_and_generated"),
        *("stateful_and_generated", "stateful_and_sampled"),
    ],
)
def test_the_order_of_a_later_epoch_is_that_of_the_first_time(tmp_path, make, batch_size):
    loader = {"_target_": f"{HERE}.{make}", "batch_size": batch_size}
    data = {"train": None, "loader": loader}
    both = run_ranks(interrupted_and_straight, 1, tmp_path, data=data)[0]
    assert differing(*both) == []


class Numbers:
    """Epoch e yields 10 e, 10 e + 1, ...; has no length."""

    def __init__(self, num):
        self.num, self.epoch = num, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(range(10 * self.epoch, 10 * self.epoch + self.num))


def unequal(rank, has_length):
    data = [[0, 1, 2, 3], [0, 1, 2], [0, 1, 2, 3, 4]][rank] if has_length else Numbers(4 - rank % 2)
    loader = EpochLoader(data)
    found = [*itertools.islice(loader.batches(0), 7)]
    resumed = EpochLoader(data)
    resumed.load_state_dict([loader.state_dict()] * 3, iteration=7, rank=rank)
    return found, [*itertools.islice(resumed.batches(7), 2)]


class Live:
    """Batches of a stream whose state is the object that it works with; has no length."""

    def __init__(self):
        self.state = {"next": 0}

    def __iter__(self):
        while self.state["next"] < 6:
            self.state["next"] += 1
            yield self.state["next"]

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def resumed_live(rank):
    loader = EpochLoader(Live())
    batches = loader.batches(0)
    assert [next(batches), next(batches)] == [1, 2]
    resumed = EpochLoader(Live())
    resumed.load_state_dict([loader.state_dict()] * 2, iteration=2, rank=rank)
    return next(resumed.batches(2))


def test_a_state_that_reading_changes_is_saved_as_it_was():
    assert run_ranks(resumed_live, 2) == [3, 3]


@pytest.mark.parametrize("has_length", [True, False])
def test_ranks_with_unequal_ends_end_an_epoch_together(has_length, caplog):
    for found, resumed in run_ranks(unequal, 3, has_length):
        step = 0 if has_length else 10
        assert found == [0, 1, 2, step, step + 1, step + 2, 2 * step]
        assert resumed == [2 * step + 1, 2 * step + 2]


def test_lengths_that_differ_are_reported(caplog):
    def text(rank):
        with caplog.at_level("INFO", logger="distrain"):
            EpochLoader([0] * (3 + rank)).batches(0)
        return caplog.text

    assert (
        "after 3 batches per rank, as on rank 0; the other ranks leave out 3 b"
        in run_ranks(text, 3)[0]
    )


def test_on_another_number_of_ranks_a_state_of_the_data_is_refused():
    loader = EpochLoader(stateful(0))
    next(loader.batches(0))
    with pytest.raises(
        ConfigError, match="ranks=1: expected 2, as the checkpoint has the position"
    ):
        EpochLoader(stateful(0)).load_state_dict([loader.state_dict()] * 2, iteration=1, rank=0)


def test_another_number_of_ranks_within_an_epoch_is_reported(caplog):
    loader = EpochLoader(shuffled(0))
    batches = loader.batches(0)
    for _ in range(3):
        next(batches)
    EpochLoader(shuffled(0)).load_state_dict([loader.state_dict()], iteration=3, rank=0)
    assert not caplog.text
    EpochLoader(shuffled(0)).load_state_dict([loader.state_dict()] * 2, iteration=3, rank=0)
    assert "ranks=1: the checkpoint was saved on 2, so the rest of epoch 0 is not" in caplog.text


def test_left_out_batches_are_reported(caplog):
    def texts(rank):
        with caplog.at_level("INFO", logger="distrain"):
            [*itertools.islice(EpochLoader(Numbers(4 - rank)).batches(0), 4)]
        return caplog.text

    assert (
        "epoch 0 ended after 3 batches per rank, when a rank had no more: 1 of"
        in run_ranks(texts, 2)[0]
    )

"""Batches epoch after epoch, from any position on."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset

import distrain
from distrain.data.epochs import EpochLoader
from distrain.errors import ConfigError


class Numbers(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor([float(index)])


class Stream(IterableDataset):
    """Epoch e yields 10 e, 10 e + 1, 10 e + 2; has a length only as DataLoader guesses it."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 2  # wrong: nothing may rely on it

    def __iter__(self):
        yield from (10 * self.epoch + i for i in range(3))


def shuffled(*, in_batch_sampler):
    sampler = DistributedSampler(Numbers(), num_replicas=1, rank=0)
    if in_batch_sampler:
        return DataLoader(Numbers(), batch_sampler=BatchSampler(sampler, 2, drop_last=True))
    return DataLoader(Numbers(), batch_size=2, sampler=sampler)


def take(data, num, *, start=0):
    return [*itertools.islice(EpochLoader(data).batches(start), num)]


def values(batches):
    return [batch.flatten().int().tolist() for batch in batches]


@pytest.mark.parametrize("in_batch_sampler", [False, True])
def test_each_epoch_is_shuffled_in_its_own_order(in_batch_sampler):
    batches = values(take(shuffled(in_batch_sampler=in_batch_sampler), 8))
    first, second = batches[:4], batches[4:]
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == [*range(8)]
    assert first != second


@pytest.mark.parametrize("in_batch_sampler", [False, True])
@pytest.mark.parametrize("start", [1, 4, 6, 13])
def test_from_any_position_on_it_gives_what_a_straight_run_sees(in_batch_sampler, start):
    straight = values(take(shuffled(in_batch_sampler=in_batch_sampler), 18))
    resumed = values(take(shuffled(in_batch_sampler=in_batch_sampler), 5, start=start))
    assert resumed == straight[start : start + 5]


@pytest.mark.filterwarnings("ignore:Length of IterableDataset")
def test_an_iterable_data_set_learns_of_its_epoch_and_its_length_is_not_believed():
    loader = DataLoader(Stream(), batch_size=None)
    assert take(loader, 7) == [0, 1, 2, 10, 11, 12, 20]
    assert take(DataLoader(Stream(), batch_size=None), 3, start=4) == [11, 12, 20]


def test_whole_epochs_before_the_position_are_not_loaded():
    class Counted(list):
        num_iterations = 0

        def __iter__(self):
            self.num_iterations += 1
            return super().__iter__()

    data = Counted("abc")
    assert take(data, 2, start=3_000_000_001) == ["b", "c"]
    assert data.num_iterations == 1


def test_batches_dropped_on_the_way_are_reported(caplog):
    with caplog.at_level("INFO", logger="distrain"):
        take([1, 2, 3], 1, start=4)
    assert "the first 1 batches of epoch 1 are loaded again" in caplog.text


def test_a_generator_that_has_ended_is_refused():
    batches = EpochLoader(each for each in [1, 2]).batches(0)
    assert [next(batches), next(batches)] == [1, 2]
    with pytest.raises(ConfigError, match="the data, a generator, gives its batches once; expect"):
        next(batches)


def test_data_without_a_batch_is_refused():
    with pytest.raises(ConfigError, match="no batch"):
        take([], 1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_resumes_a_plain_data_loader_where_it_stopped(accumulation):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)
            self.seen = []

        def forward(self, x):
            self.seen += x.flatten().int().tolist()
            return self.layer(x).mean()

    def make():
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        data = shuffled(in_batch_sampler=False)
        return model, distrain.Trainer(model, optimizer, data, accumulation=accumulation)

    straight, trainer = make()
    trainer.train(0, 10)
    _, trainer = make()
    trainer.train(0, 6)
    state = trainer.state_dict()
    resumed, trainer = make()
    trainer.load_state_dict(state)
    trainer.train(6, 10)
    assert resumed.seen == straight.seen[6 * 2 * accumulation :]

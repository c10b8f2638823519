"""The global stream held to its formula, for any number of ranks, forwards and workers."""

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from distrain.data.loader import EvalLoader, TrainLoader
from distrain.data.samplers import Shuffled
from distrain.data.stream import micro_batches
from distrain.errors import ConfigError

SIZE, B, SEED = 29, 24, 5  # no batch ends with an epoch before iteration 29


class Drawing(Dataset[dict[str, Any]]):
    """Says which sample it is, and draws from all three generators."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawn = [random.random(), np.random.randn(), torch.rand(()).item()]
        return {"sample": index, "drawn": torch.tensor(drawn, dtype=torch.float64)}


def loader_of(rank: int = 0, world_size: int = 1, **kwargs: Any) -> TrainLoader:
    kwargs = {"dataset": Drawing(), "batch_size": B, "seed": SEED} | kwargs
    dataset = kwargs.pop("dataset")
    return TrainLoader(dataset, rank=rank, world_size=world_size, **kwargs)


def global_micro_batches(
    world_size: int, accumulation: int, workers: int, start: int, num_iters: int
) -> list[tuple[list[int], torch.Tensor]]:
    """Return samples (B / A,) and draws (B / A, 3) of each micro-batch of all ranks together."""
    loaders = [
        loader_of(rank, world_size, accumulation=accumulation, workers=workers)
        for rank in range(world_size)
    ]
    num = num_iters * accumulation
    ranks = [[*islice(loader.batches(start), num)] for loader in loaders]
    return [
        (
            torch.cat([batch["sample"] for batch in parts]).tolist(),
            torch.cat([batch["drawn"] for batch in parts]),
        )
        for parts in zip(*ranks, strict=True)
    ]


@pytest.fixture(scope="module")
def ledger() -> dict[int, tuple[list[int], torch.Tensor]]:
    """Return the samples and draws of each iteration, as one rank without workers sees them."""
    return dict(enumerate(global_micro_batches(1, 1, 0, 0, 12)))


def test_the_stream_is_permutation_after_permutation() -> None:
    order = Shuffled(SIZE, seed=SEED)
    parts = [order.at(iteration * B, B) for iteration in range(SIZE)]
    epochs, samples = (np.concatenate(column) for column in zip(*parts, strict=True))
    assert epochs.tolist() == [position // SIZE for position in range(SIZE * B)]
    orders = samples.reshape(B, SIZE)
    assert all(sorted(order) == [*range(SIZE)] for order in orders.tolist())
    assert len({*map(tuple, orders.tolist())}) == B


def test_without_shuffling_it_is_the_sets_own_order_over_and_over() -> None:
    order = Shuffled(3, seed=0, shuffle=False)
    batches = [[part.tolist() for part in order.at(2 * i, 2)] for i in range(4)]
    assert batches == [[[0, 0], [0, 1]], [[0, 1], [2, 0]], [[1, 1], [1, 2]], [[2, 2], [0, 1]]]


def test_a_batch_may_hold_several_epochs() -> None:
    epochs, samples = Shuffled(2, seed=0).at(7, 7)
    assert epochs.tolist() == [3, 4, 4, 5, 5, 6, 6]
    assert sorted(samples[1:3]) == sorted(samples[3:5]) == sorted(samples[5:]) == [0, 1]


@given(
    size=st.integers(1, 10_000), batch_size=st.integers(1, 300), iteration=st.integers(0, 2 * 10**9)
)
@settings(max_examples=60, deadline=None)
def test_any_iteration_is_where_the_formula_says(
    size: int, batch_size: int, iteration: int
) -> None:
    order = Shuffled(size, seed=1)
    first = iteration * batch_size
    epochs, samples = order.at(first, batch_size)
    assert epochs.tolist() == [p // size for p in range(first, first + batch_size)]
    assert ((samples >= 0) & (samples < size)).all()
    for k in {0, batch_size // 2, batch_size - 1}:  # each sample by itself
        assert order.at(first + k, 1)[1][0] == samples[k]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("start", [0, 7])
def test_ranks_together_see_the_global_stream(
    ledger: Any, world_size: int, accumulation: int, start: int
) -> None:
    check_against(ledger, world_size, accumulation, workers=0, start=start)


@pytest.mark.parametrize(("world_size", "accumulation", "start"), [(1, 2, 3), (2, 1, 7), (3, 2, 0)])
@pytest.mark.ranks
def test_loader_workers_change_neither_order_nor_draws(
    ledger: Any, world_size: int, accumulation: int, start: int
) -> None:
    check_against(ledger, world_size, accumulation, workers=2, start=start)


def check_against(
    ledger: Any, world_size: int, accumulation: int, *, workers: int, start: int
) -> None:
    """Micro-batch m of all ranks is the m-th part of the batch, to the bit of every draw."""
    parts = global_micro_batches(world_size, accumulation, workers, start, num_iters=4)
    size = B // accumulation
    for number, (samples, drawn) in enumerate(parts):
        whole_samples, whole_drawn = ledger[start + number // accumulation]
        at = number % accumulation * size
        assert samples == whole_samples[at : at + size]
        assert torch.equal(drawn, whole_drawn[at : at + size])


def test_the_loader_starts_at_any_iteration_at_once() -> None:
    far = 10**9
    batch = next(loader_of(1, 2).batches(far))
    _, samples = Shuffled(SIZE, seed=SEED).at(far * B, B)
    assert batch["sample"].tolist() == samples[B // 2 :].tolist()


def test_the_stream_goes_on_where_a_block_of_positions_ends() -> None:
    loader = loader_of(dataset=TensorDataset(torch.arange(SIZE)), batch_size=1000)
    order = Shuffled(SIZE, seed=SEED)
    for iteration, (batch,) in enumerate(islice(loader.batches(0), 10)):
        assert batch.tolist() == order.at(iteration * 1000, 1000)[1].tolist()


def test_draws_differ_between_samples_epochs_and_seeds(ledger: Any) -> None:
    drawn = torch.cat([drawn for _, drawn in ledger.values()])  # (12 * 24, 3)
    for column in drawn.T:
        assert len({*column.tolist()}) == 12 * B
    other = next(loader_of(seed=SEED + 1).batches(0))
    assert not {*other["drawn"][:, 0].tolist()} & {*drawn[:, 0].tolist()}


@pytest.mark.parametrize(
    ("batch_size", "ranks", "accumulation", "largest", "expected"),
    [
        (64, 2, 1, None, 1),
        (64, 2, 4, None, 4),
        (48, 2, 1, 12, 2),  # two ranks take over from four
        (48, 1, 1, 12, 4),
        (48, 4, 1, 12, 1),
        (48, 3, 2, 5, 4),  # forwards of 16 / 4
        (48, 8, 4, 6, 6),  # 6 a rank: neither 4 nor 5 divides them
        (7, 1, 1, 6, 7),
        (7, 1, 1, 7, 1),
    ],
)
def test_the_number_of_forwards(
    batch_size: int, ranks: int, accumulation: int, largest: int | None, expected: int
) -> None:
    assert (
        micro_batches(batch_size, ranks=ranks, accumulation=accumulation, largest=largest)
        == expected
    )


@given(
    batch_size=st.integers(1, 200),
    ranks=st.integers(1, 8),
    accumulation=st.integers(1, 5),
    largest=st.integers(1, 64),
)
def test_the_number_of_forwards_is_the_least_that_fits(
    batch_size: int, ranks: int, accumulation: int, largest: int
) -> None:
    fits = [
        number
        for number in range(accumulation, batch_size + 1)
        if batch_size % (number * ranks) == 0 and batch_size // (number * ranks) <= largest
    ]
    call = {"ranks": ranks, "accumulation": accumulation, "largest": largest}
    if fits:
        assert micro_batches(batch_size, **call) == fits[0]
    else:
        with pytest.raises(ConfigError):
            micro_batches(batch_size, **call)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulation", "nearest"),
    [(64, 3, 1, "63 or 66"), (50, 4, 2, "48 or 56"), (2, 4, 1, "4"), (3, 1, 2, "2 or 4")],
)
def test_a_batch_that_does_not_divide_names_those_that_do(
    batch_size: int, world_size: int, accumulation: int, nearest: str
) -> None:
    with pytest.raises(ConfigError, match=f"the nearest: {nearest}$"):
        loader_of(0, world_size, batch_size=batch_size, accumulation=accumulation)


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))

    def __len__(self) -> int:
        return 10


@pytest.mark.parametrize("loader", [TrainLoader, EvalLoader])
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], r"list has length 0"),
        (TensorDataset(torch.ones(0, 2)), r"TensorDataset has length 0"),
        (iter([1]), r"not a map-style data set; expected __len__"),
        (Endless(), r"Endless is not a map-style data set"),
    ],
)
def test_data_sets_that_cannot_be_used(loader: Any, dataset: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loader(dataset, batch_size=4)


def test_numbers_that_cannot_be_used() -> None:
    for wrong in ({"batch_size": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match=[*wrong][0]):
            loader_of(**wrong)
    with pytest.raises(ConfigError, match="eval_batch_size"):
        EvalLoader([1], batch_size=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 3, 12, 29])
def test_evaluation_has_every_sample_once(world_size: int, size: int) -> None:
    shares = []
    for rank in range(world_size):
        loader = EvalLoader([*range(size)], batch_size=4, rank=rank, world_size=world_size)
        batches = [batch.tolist() for batch in loader]
        assert len(batches) == len(loader)
        assert all(len(batch) == 4 for batch in batches[:-1])
        assert batches == [batch.tolist() for batch in loader]
        shares.append([sample for batch in batches for sample in batch])
    assert [sample for share in shares for sample in share] == [*range(size)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.ranks
def test_evaluation_draws_the_same_each_time_and_everywhere() -> None:
    def drawn(world_size: int, workers: int) -> torch.Tensor:
        loaders = [
            EvalLoader(
                Drawing(), batch_size=5, rank=rank, world_size=world_size, workers=workers, seed=3
            )
            for rank in range(world_size)
        ]
        return torch.cat([batch["drawn"] for loader in loaders for batch in loader])

    first = drawn(1, 0)
    assert torch.equal(first, drawn(1, 0))
    assert torch.equal(first, drawn(3, 0))
    assert torch.equal(first, drawn(2, 2))

from fractions import Fraction

import pytest
from torch.utils.data import DataLoader, IterableDataset

from distrain.data import TrainLoader
from distrain.data.epochs import iters_per_epoch
from distrain.durations import epochs, iterations, seconds, whole_iterations
from distrain.errors import ConfigError
from distrain.hooks.periodic import ends_period


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 epochs", 3),
        ("0.5 epoch", Fraction(1, 2)),
        (".1epochs", Fraction(1, 10)),
    ],
)
def test_epochs_are_read_exactly(text, number):
    assert epochs(text) == number


@pytest.mark.parametrize("value", [3, "3", "epochs", "0 epochs", "-1 epochs", "1 epoch s", None])
def test_anything_else_is_no_number_of_epochs(value):
    assert epochs(value) is None


def test_a_length_in_epochs_is_exact_and_rounded_up_once():
    per_epoch = Fraction(100, 40)
    assert iterations("k", "1 epoch", iters_per_epoch=per_epoch) == Fraction(5, 2)
    assert whole_iterations("k", "3 epochs", iters_per_epoch=per_epoch) == 8
    assert whole_iterations("k", 7, iters_per_epoch=None) == 7
    with pytest.raises(ConfigError, match="^k=1 epoch: expected a number of iterations, as the"):
        iterations("k", "1 epoch", iters_per_epoch=None)
    with pytest.raises(ConfigError, match="^k=0: expected an integer >= 1, or epochs, as '2 epoch"):
        iterations("k", 0, iters_per_epoch=None)


def test_a_period_of_a_fraction_ends_where_its_epoch_does():
    assert [d for d in range(1, 11) if ends_period(d, Fraction(5, 2))] == [3, 5, 8, 10]
    assert [d for d in range(1, 11) if ends_period(d, Fraction(2, 3))] == [*range(1, 11)]
    assert [d for d in range(1, 11) if ends_period(d, 4)] == [4, 8]


@pytest.mark.parametrize(
    ("text", "number"), [("2h30m", 9000), ("1d 1s", 86401), ("15m", 900), (90, 90), ("0.5", 0.5)]
)
def test_durations_in_seconds(text, number):
    assert seconds("k", text) == number


@pytest.mark.parametrize("text", ["2 hours", "", 0, -1, "0m", True, "nan", "1e999"])
def test_other_text_is_no_duration(text):
    with pytest.raises(ConfigError, match="expected a duration, as 15m, 2h30m or 90"):
        seconds("k", text)


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())

    def __len__(self):
        return 10


def test_the_length_of_an_epoch():
    loader = TrainLoader(range(100), batch_size=40, world_size=2, accumulation=2)
    assert iters_per_epoch(loader, forwards=4, accumulation=2) == Fraction(5, 2)
    loader = DataLoader(range(100), batch_size=8)  # 13 batches of one rank
    assert iters_per_epoch(loader, forwards=4, accumulation=2) == Fraction(13, 2)
    assert iters_per_epoch(DataLoader(Endless()), forwards=1, accumulation=1) is None
    assert iters_per_epoch(iter([]), forwards=1, accumulation=1) is None

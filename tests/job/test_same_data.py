"""Data sets that differ between ranks are refused at the start, and nothing else is."""

import os
import random
import re
import time

import numpy as np
import pytest
import torch
from ranks import run_ranks
from resume_cases import conf_of

from distrain.distributed.ranks import topology
from distrain.errors import ConfigError
from distrain.job import same_data
from distrain.job.data import build_datasets
from distrain.job.same_data import check_same_data, open_files

pytestmark = pytest.mark.ranks


class Made:
    """Samples of a function of index and rank."""

    def __init__(self, rank, make, num=9):
        self.rank, self.make, self.num = rank, make, num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return self.make(index, self.rank)


def check(rank, make=lambda index, rank: index, nums=(9, 9), **keywords):
    """Check data sets of samples that a function makes; return the error's text, or None."""
    dataset = Made(rank, make, nums[rank])
    keywords = {"open_before": open_files(), "may_fork": True, "seed": 3} | keywords
    try:
        check_same_data({"data.eval": dataset}, **keywords)
    except ConfigError as error:
        return str(error)
    return None


def test_another_length_is_refused_on_all_ranks():
    texts = run_ranks(check, 3, nums=(30, 30, 20), may_fork=False)
    assert texts[0].startswith("data.eval: rank 0 has 30 samples, rank 2 has 20; expected the same")
    assert texts == texts[:1] * 3


def noise(index, rank):
    return torch.randn(20, generator=torch.Generator().manual_seed(index + 100 * rank))


def image(size):
    from PIL import Image

    return Image.new("L", (size, 4))


DIFFERENT = {
    "int": lambda index, rank: index + rank,
    "text": lambda index, rank: {"name": f"a/{index}-{rank}.jpg", "value": 1},
    "bytes": lambda index, rank: [b"x", bytes([rank])],
    "token ids": lambda index, rank: np.array([1000000, 1000000 + rank]),
    "floats": noise,
    "order of floats": lambda index, rank: noise(index, 0).flip(0) if rank else noise(index, 0),
    "bfloat16": lambda index, rank: noise(index, rank).bfloat16(),
    "complex": lambda index, rank: torch.polar(torch.ones(20), noise(index, rank)),
    "shape": lambda index, rank: torch.zeros(3 + rank),
    "dtype": lambda index, rank: torch.zeros(3, dtype=[torch.int32, torch.int64][rank]),
    "images": lambda index, rank: np.full((4, 4), 100 + 10 * rank, np.uint8),
    "PIL": lambda index, rank: (image(8 + rank), 0),
    "one sample only": lambda index, rank: index + (index == 8) * rank,
    "names": lambda index, rank: {"a": 1} if rank else {"b": 1},
}


@pytest.mark.parametrize("make", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_samples_that_differ_are_refused(make):
    first, second = run_ranks(check, 2, make)
    assert first == second
    assert first.startswith("data.eval: sample ")
    assert " on rank 0, (" in first
    assert " on rank 1; expected the same data set on all ranks: " in first


def test_the_message_has_both_values():
    first, _ = run_ranks(check, 2, lambda index, rank: (torch.tensor([0.5 + rank, 2]), "cat"))
    assert first.startswith("data.eval: sample 0 is (")
    assert "0.5 2, cat) on rank 0, (" in first
    assert "1.5 2, cat) on rank 1;" in first


def test_the_message_tells_values_apart_that_begin_alike():
    first, _ = run_ranks(check, 2, lambda index, rank: torch.tensor([7, 7, 7, rank]))
    mine, theirs = re.findall(r"int64\[4\], 7 7 7 ... (\w+)", first)
    assert mine != theirs


def unseeded(index, rank):
    return time.perf_counter_ns()


def drawn(index, rank):
    return random.random(), np.random.rand(), torch.rand(3)


def fails(index, rank):
    raise OSError("not on this node") if rank else ValueError


def dies(index, rank):
    os._exit(1) if rank else None
    return index + rank


def forks_only(index, rank):
    print("printed", index)
    return lambda: index


def pixel(rank):
    image = np.zeros((64, 64), np.uint8)
    image[0, 0] = rank
    return image


class Address:
    def size(self):
        return 1


SAME = {
    "unseeded": unseeded,
    "drawn": drawn,
    "fails": fails,
    "dies": dies,
    "local folders": lambda index, rank: f"/scratch/rank{rank}/{index}.jpg",
    "decoded by another library": lambda index, rank: noise(index, 0) * (1 + 1e-5 * rank),
    "a pixel": lambda index, rank: np.full((64, 64), 128, np.uint8) + pixel(rank),
    "not a number": lambda index, rank: torch.tensor([float("nan"), float("inf"), 1.0]),
    "closures": forks_only,
    "objects": lambda index, rank: {"a": Address(), Address(): 1},
    "nothing": lambda index, rank: [None, (), {}, torch.zeros(0), True],
}


@pytest.mark.parametrize("make", SAME.values(), ids=SAME.keys())
def test_what_is_alike_or_cannot_be_known_is_taken(make, capfd):
    assert run_ranks(check, 2, make) == [None, None]
    assert "printed" not in capfd.readouterr().out


def hangs(index, rank):
    time.sleep(60 if rank else 0)
    return index + rank


def test_a_sample_that_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(same_data, "PROBE_S", 0.5)
    assert run_ranks(check, 2, hangs) == [None, None]
    texts = run_ranks(check, 2, hangs, nums=(3, 4))
    assert texts[1].startswith("data.eval: rank 0 has 3 samples, rank 1 has 4;")


class File:
    """Reads a file that is open, through a buffer, and counts."""

    def __init__(self, path):
        self.file = open(path, "rb")  # noqa: SIM115
        self.file.read(1)
        self.num_calls = 0

    def __len__(self):
        return 100

    def __getitem__(self, index):
        random.random(), np.random.rand(), torch.rand(())
        self.num_calls += 1
        self.file.seek(1000 * index)
        return self.file.read(1000)


def state(rank, path):
    before = open_files()
    dataset = File(path)
    torch.manual_seed(rank)
    check_same_data({"data.train": dataset}, seed=0, open_before=before, may_fork=True)
    position, draw = os.lseek(dataset.file.fileno(), 0, os.SEEK_CUR), torch.rand(()).item()
    torch.manual_seed(rank)
    # 8,000 bytes are in the buffer, the rest comes from the position in the file
    dataset.file.seek(0)
    return (
        draw == torch.rand(()).item(),
        dataset.num_calls,
        position,
        dataset.file.read(10_000) == path.read_bytes()[:10_000],
    )


def test_nothing_of_the_data_set_is_disturbed(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(np.random.default_rng(0).bytes(100_000))
    (ok, num_calls, position, is_right), _ = run_ranks(state, 2, path)
    assert ok
    assert num_calls == 0
    assert 0 < position < 10_000  # where its buffer ends
    assert is_right


def connected(rank):
    before = open_files()
    read, write = os.pipe()  # as a connection to a server
    text = check(rank, lambda index, rank: rank, open_before=before)
    os.close(read), os.close(write)
    return text


def test_a_data_set_with_a_connection_is_compared_by_length():
    assert run_ranks(connected, 2) == [None, None]


def seeds(rank):
    return check(rank, lambda index, rank: random.random(), seed=rank)


def test_what_samples_draw_is_seeded_as_in_training():
    assert "sample 0 is (0." in run_ranks(seeds, 2)[0]


class OfItsRank(torch.utils.data.IterableDataset):
    """A stream that reads another part on each rank."""

    def __iter__(self):
        return iter([torch.tensor([float(10 * torch.distributed.get_rank())])])


def streams(rank):
    conf = conf_of(data={"train": {"_target_": f"{__name__}.OfItsRank"}})
    with pytest.raises(ConfigError) as error:
        build_datasets(conf, topology())
    return str(error.value)


def test_a_stream_that_reads_a_part_per_rank_is_noticed():
    for text in run_ranks(streams, 2):
        assert text.startswith("data.train: sample 0 is (float32[1] 0) on rank 0, (float32[1] 10)")
        assert "splits_itself: true" in text

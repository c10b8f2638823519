"""Iterable data: each sample once, on any number of ranks and workers, and bit-exact resumption.

With Hugging Face datasets and webdataset as they are, on files of theirs.
"""

import functools
import io
import itertools
import json
import pickle
import random
import tarfile
import time

import datasets
import pytest
import torch
import webdataset
from ranks import run_ranks
from resume_cases import Images, differing, interrupted_and_straight
from torch.utils.data import IterableDataset, get_worker_info

from distrain.checkpoint.portable import from_portable, to_portable
from distrain.data import IterableLoader
from distrain.errors import ConfigError

HERE = __name__
SIZE = 29


class Stream(IterableDataset):
    """Images in another order in each epoch; draws, and has no state."""

    def __init__(self):
        self.images, self.epoch = Images(SIZE), 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def order(self):
        return torch.randperm(SIZE, generator=torch.Generator().manual_seed(self.epoch)).tolist()

    def __iter__(self):
        return (self.images[i] for i in self.order())


class StatefulStream(Stream):
    """As `Stream`, with a state; reading again would fail."""

    start = next = 0

    def __iter__(self):
        order, self.next, self.start = self.order(), self.start, 0
        for i in order[self.next :]:
            self.next += 1
            yield self.images[i]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.start = state["next"]


def rows():
    """The images as rows of plain values."""
    for x, y, index, drawn in (Images(SIZE, noise=0)[i] for i in range(SIZE)):
        yield {"x": x.flatten().tolist(), "y": int(y), "index": index, "drawn": drawn}


def collate(samples):
    if "json" in samples[0]:
        samples = [json.loads(sample["json"]) for sample in samples]
    columns = {name: torch.tensor([row[name] for row in samples]) for name in samples[0]}
    return columns | {"x": columns["x"].reshape(-1, 1, 6, 6)}


SHARDS = [9, 8, 5, 7]  # so that ranks, and loader processes, have unequal parts


def json_files(folder):
    left = rows()
    for number, size in enumerate(SHARDS):
        lines = [json.dumps(row) + "\n" for row in itertools.islice(left, size)]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return sorted(map(str, folder.glob("*.jsonl")))


def tar_files(folder):
    left = rows()
    for number, size in enumerate(SHARDS):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for row in itertools.islice(left, size):
                text = json.dumps(row).encode()
                info = tarfile.TarInfo(f"{row['index']}.json")
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
    return sorted(map(str, folder.glob("*.tar")))


def hugging_face(files, buffer=None):
    found = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    return found if buffer is None else found.shuffle(seed=1, buffer_size=buffer)


def shards(files, shuffle=4):
    return webdataset.WebDataset(
        files,
        nodesplitter=webdataset.split_by_node,
        shardshuffle=shuffle,
        detshuffle=True,
        seed=0,
        empty_check=False,
    )


def case(name, folder):
    if name in ("Stream", "StatefulStream"):
        return {"train": {"_target_": f"{HERE}.{name}"}}
    if name == "webdataset":
        train = {"_target_": f"{HERE}.shards", "files": tar_files(folder)}
    else:
        train = {"_target_": f"{HERE}.hugging_face", "files": json_files(folder)}
        train["buffer"] = 6 if name == "buffer" else None
    return {"train": train, "collate": f"{HERE}.collate"}


CASES = [
    ("Stream", 3, 2),
    ("StatefulStream", 2, 2),
    ("hugging_face", 2, 2),
    ("buffer", 1, 0),
    ("webdataset", 2, 2),
]


@pytest.mark.parametrize(("name", "ranks", "workers"), CASES)
def test_interrupted_is_straight_bit_for_bit(tmp_path, name, ranks, workers):
    settings = {"workers": workers, "data": case(name, tmp_path), "noise": "stream" in name.lower()}
    both = run_ranks(interrupted_and_straight, ranks, tmp_path, **settings)[0]
    assert differing(*both) == []
    assert len(both[1]["stream"]["ranks"]) == ranks


def indices(rank, ranks, dataset, start, num, **keywords):
    loader = IterableLoader(dataset, batch_size=12, rank=rank, world_size=ranks, **keywords)
    batches = [*itertools.islice(loader.batches(start), num * loader.accumulation)]
    loader.close()
    return [batch["index"] if isinstance(batch, dict) else batch[2] for batch in batches]


@pytest.mark.parametrize("dataset", [Stream(), StatefulStream()])
def test_any_number_of_ranks_and_workers_sees_the_same_batches(dataset):
    """Iteration i takes samples [12 i, 12 i + 12) of the epochs one after another."""
    expected = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        expected += dataset.order()
    for ranks, workers, accumulation in ((1, 0, 1), (2, 2, 1), (3, 0, 2), (3, 1, 1)):
        of_ranks = [
            indices(rank, ranks, dataset, 0, 6, workers=workers, accumulation=accumulation)
            for rank in range(ranks)
        ]
        found = torch.cat([batch for step in zip(*of_ranks, strict=True) for batch in step])
        assert found.tolist() == expected[:72]


def drawn_order():
    """An order and a shuffle buffer of the global generators."""
    buffer = []
    for index in torch.randperm(SIZE).tolist():
        buffer.append({"index": index})
        if len(buffer) == 4:
            yield buffer.pop(random.randrange(4))
    yield from buffer


def test_an_order_that_is_drawn_is_the_same_in_all_readers():
    random.seed(1)
    expected = torch.cat(indices(0, 1, drawn_order, 0, 6)).tolist()
    for begin in (0, SIZE):
        assert sorted(expected[begin : begin + SIZE]) == [*range(SIZE)]
    assert expected[:SIZE] != expected[SIZE : 2 * SIZE]
    for ranks, workers in ((2, 2), (3, 0)):
        of_ranks = []
        for rank in range(ranks):
            random.seed(rank)  # as in training, each rank has other generators, and uses them
            loader = IterableLoader(
                drawn_order, batch_size=12, rank=rank, world_size=ranks, workers=workers
            )
            batches, drawn = loader.batches(0), []
            own = random.Random(rank)
            for _ in range(6):
                drawn.append(next(batches)["index"])
                assert random.random() == own.random()
            of_ranks.append(drawn)
            loader.close()
        found = torch.cat([batch for step in zip(*of_ranks, strict=True) for batch in step])
        assert found.tolist() == expected
    # in the middle of the second epoch
    loader = IterableLoader(drawn_order, batch_size=12)
    batches = loader.batches(0)
    for _ in range(4):
        next(batches)
    resumed = IterableLoader(drawn_order, batch_size=12)
    resumed.load_state_dict([loader.state_dict()], iteration=4, rank=0)
    assert next(resumed.batches(4))["index"].tolist() == expected[48:60]


class DrawnParts(IterableDataset):
    """Every n-th sample of an order that is drawn, with a random number."""

    def __init__(self, rank, ranks):
        self.rank, self.ranks = rank, ranks

    def __iter__(self):
        order = list(range(24))
        random.shuffle(order)
        info = get_worker_info()
        readers, reader = (info.num_workers, info.id) if info else (1, 0)
        for index in order[self.rank * readers + reader :: self.ranks * readers]:
            yield {"index": index, "drawn": random.random()}


@pytest.mark.parametrize("workers", [0, 2])
def test_an_order_that_is_drawn_is_that_of_all_parts_and_of_a_resumed_run(workers):
    settings = {"batch_size": 4, "world_size": 2, "workers": workers, "splits_itself": True}
    indices, drawn = [], []
    for rank in range(2):
        random.seed(rank)  # as in training
        own = random.Random(rank)
        loader = IterableLoader(DrawnParts(rank, 2), rank=rank, **settings)
        batches = loader.batches(0)
        states, found = [], []
        for _ in range(6):
            found.append(next(batches))
            states.append(from_portable(to_portable(loader.state_dict())))
            assert random.random() == own.random()
        loader.close()
        resumed = IterableLoader(DrawnParts(rank, 2), rank=rank, **settings)
        resumed.load_state_dict([states[1]] * 2, iteration=2, rank=rank)
        batches = resumed.batches(2)
        for expected in found[2:]:
            batch = next(batches)
            assert all(torch.equal(batch[key], expected[key]) for key in expected)
        resumed.close()
        indices += [index for batch in found for index in batch["index"].tolist()]
        drawn += [number for batch in found for number in batch["drawn"].tolist()]
    assert sorted(indices) == [*range(24)]
    # the first one of each part follows from the seed of all
    assert len(set(drawn)) == 24 - 2 * max(workers, 1) + 1


class DrawingStream(StatefulStream):
    def __iter__(self):
        return ({"index": random.random() + torch.rand(())} for _ in super().__iter__())


class DrawnOrder(StatefulStream):
    """An order that is drawn when an epoch begins, or that of the state."""

    def __init__(self, saves_order):
        super().__init__()
        self.saves_order, self.drawn = saves_order, None

    def __iter__(self):
        if self.drawn is None:
            self.drawn = list(range(SIZE))
            random.shuffle(self.drawn)
        order, self.next, self.start = self.drawn, self.start, 0
        for index in order[self.next :]:
            self.next += 1
            # in the second half others, as when a second file begins
            yield {"index": random.randrange(100) if self.next > 18 else index}
        self.drawn = None

    def state_dict(self):
        return super().state_dict() | ({"order": self.drawn} if self.saves_order else {})

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.drawn = state.get("order")


@pytest.mark.parametrize("saves_order", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"workers": 2}, {"seed_samples": True}, {"splits_itself": True}]
)
def test_an_order_that_is_drawn_is_that_before_the_position_of_a_state(saves_order, settings):
    loader = IterableLoader(DrawnOrder(saves_order), batch_size=6, **settings)
    batches = loader.batches(0)
    straight, states = [], []
    for _ in range(8):
        straight.append(next(batches)["index"].tolist())
        states.append(from_portable(to_portable(loader.state_dict())))
    loader.close()
    # what is drawn with the first sample after the position is not known from the order alone
    for done in (1, 2, 3, 4, 6, 7) if saves_order else (1, 2, 6):
        resumed = IterableLoader(DrawnOrder(saves_order), batch_size=6, **settings)
        resumed.load_state_dict([states[done - 1]], iteration=done, rank=0)
        batches = resumed.batches(done)
        for expected in straight[done:]:
            assert next(batches)["index"].tolist() == expected
        resumed.close()


def test_an_order_that_is_drawn_is_that_before_a_position_after_one_sample():
    loader = IterableLoader(DrawnOrder(saves_order=False), batch_size=SIZE + 1)
    batches = loader.batches(0)
    next(batches)
    state = from_portable(to_portable(loader.state_dict()))
    resumed = IterableLoader(DrawnOrder(saves_order=False), batch_size=SIZE + 1)
    resumed.load_state_dict([state], iteration=1, rank=0)
    assert torch.equal(next(resumed.batches(1))["index"], next(batches)["index"])


@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_of_a_data_set_with_a_state_go_on_in_a_resumed_run(workers):
    expected = torch.cat(indices(0, 1, DrawingStream(), 0, 6, workers=workers))
    loader = IterableLoader(DrawingStream(), batch_size=12, workers=workers)
    batches = loader.batches(0)
    for _ in range(4):
        next(batches)
    state = from_portable(to_portable(loader.state_dict()))
    loader.close()
    resumed = IterableLoader(DrawingStream(), batch_size=12, workers=workers)
    resumed.load_state_dict([state], iteration=4, rank=0)
    batches = resumed.batches(4)
    assert torch.equal(torch.cat([next(batches)["index"] for _ in range(2)]), expected[48:])
    resumed.close()


def test_a_checkpoint_continues_on_another_number_of_ranks_without_reading_again(caplog):
    whole = torch.cat(indices(0, 1, StatefulStream(), 0, 6))
    loaders = [
        IterableLoader(StatefulStream(), batch_size=12, rank=r, world_size=2) for r in (0, 1)
    ]
    for loader in loaders:
        [*itertools.islice(loader.batches(0), 4)]
    states = [loader.state_dict() for loader in loaders]
    parts = []
    for rank in range(3):
        loader = IterableLoader(StatefulStream(), batch_size=12, rank=rank, world_size=3, workers=1)
        loader.load_state_dict(states, iteration=4, rank=rank)
        parts.append([batch[2] for batch in itertools.islice(loader.batches(4), 2)])
        loader.close()
    found = torch.cat([batch for step in zip(*parts, strict=True) for batch in step])
    assert torch.equal(found, whole[48:])
    assert "read again" not in caplog.text
    loader = IterableLoader(Stream(), batch_size=12)
    loader.load_state_dict(states, iteration=4, rank=0)
    states[-1]["position"]["own"] = None
    loader.load_state_dict(states, iteration=4, rank=0)
    assert "19 samples are read again and dropped" in caplog.text
    assert "Stream has no state_dict() and load_state_dict()" in caplog.text
    loader = IterableLoader(functools.partial(shards_in_order, []), batch_size=12)
    loader.load_state_dict(states, iteration=4, rank=0)
    assert "shards_in_order has no state_dict() and load_state_dict()" in caplog.text


class Buffered(IterableDataset):
    """Samples as text, in the order of a shuffle buffer; its state is the buffer itself."""

    def __init__(self):
        self.state, self.is_resumed = None, False

    def __iter__(self):
        if not self.is_resumed:
            self.state = {"next": 0, "buffer": []}
        state, self.is_resumed = self.state, False
        while state["next"] < 80 or state["buffer"]:
            while state["next"] < 80 and len(state["buffer"]) < 4:
                state["buffer"].append(state["next"])
                state["next"] += 1
            yield str(state["buffer"].pop(state["next"] % len(state["buffer"])))

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state, self.is_resumed = state, True


def of_live_state(rank, ranks, **keywords):
    """Return the fourth batch, straight and after resumption from each of the first three."""
    keywords |= {"batch_size": 4, "rank": rank, "world_size": ranks}
    loader = IterableLoader(Buffered(), **keywords)
    batches, states = loader.batches(0), []
    for _ in range(3):
        next(batches)
        time.sleep(0.05)  # loader processes read ahead
        states.append(pickle.dumps(loader.state_dict()))
    found = [next(batches)]
    loader.close()
    for done, state in enumerate(states, 1):
        resumed = IterableLoader(Buffered(), **keywords)
        resumed.load_state_dict([pickle.loads(state)] * ranks, iteration=done, rank=rank)
        found.append([*itertools.islice(resumed.batches(done), 4 - done)][-1])
        resumed.close()
    return found


@pytest.mark.parametrize(
    ("ranks", "keywords"),
    [
        (1, {}),
        (1, {"workers": 1}),  # reads while a thread of the process sends the batch before
        (2, {"splits_itself": True}),  # reads one batch ahead, to end the epoch on all ranks
    ],
)
def test_a_state_that_reading_changes_is_saved_as_it_was(ranks, keywords):
    for found in run_ranks(of_live_state, ranks, ranks, **keywords):
        assert found == [found[0]] * 4


def shards_in_order(files):
    return shards(files, shuffle=False)


def parts_of_epochs(rank, make, files, workers):
    """Return the samples of 40 forwards of this rank."""
    ranks = torch.distributed.get_world_size()
    found = indices(rank, ranks, make(files), 0, 40, collate=collate, workers=workers)
    return torch.cat(found).tolist()


@pytest.mark.parametrize(
    ("make", "files"), [(hugging_face, json_files), (shards_in_order, tar_files)]
)
@pytest.mark.parametrize(("ranks", "workers"), [(2, 2), (3, 1)])
def test_no_sample_twice_in_an_epoch_and_ranks_end_it_together(
    tmp_path, make, files, ranks, workers
):
    of_ranks = run_ranks(parts_of_epochs, ranks, make, files(tmp_path), workers)
    size = 12 // ranks
    # samples of all ranks up to the first repetition on any rank: one epoch of all ranks
    ends = []
    for found in of_ranks:
        seen = set()
        ends.append(next(i for i, x in enumerate(found) if x in seen or seen.add(x)) // size)
    assert len(set(ends)) == 1, "the epoch ends after the same forward on all ranks"
    epoch = [index for found in of_ranks for index in found[: ends[0] * size]]
    assert len(set(epoch)) == len(epoch) > 0


def test_samples_left_out_are_logged(tmp_path, caplog):
    def text(rank, files):
        with caplog.at_level("INFO", logger="distrain"):
            parts_of_epochs(rank, hugging_face, files, 0)
        return caplog.text

    logged = run_ranks(text, 2, json_files(tmp_path))[0]
    # 29 samples; shards 9 + 5 and 8 + 7 make 2 batches of 6 per rank: 2 + 3 are left
    assert "epoch 0 has ended" in logged
    assert "samples that were read and left out: 5" in logged


def numbers(epoch, last=3):
    for i in range(last):
        yield {"index": 10 * epoch + i}


def test_a_generator_function_is_called_in_each_epoch():
    assert torch.cat(indices(0, 1, numbers, 0, 1))[:7].tolist() == [0, 1, 2, 10, 11, 12, 20]
    with pytest.raises(ConfigError, match="data.train=generator: .*give the function instead"):
        IterableLoader(numbers(0), batch_size=1)


def test_mistakes(tmp_path):
    loader = IterableLoader(hugging_face(json_files(tmp_path)), batch_size=4, collate=collate)
    next(loader.batches(0))
    with pytest.raises(
        ConfigError, match="ranks=1: expected 2, as the checkpoint has the position"
    ):
        loader.load_state_dict([loader.state_dict()] * 2, iteration=1, rank=0)
    other = IterableLoader(hugging_face(json_files(tmp_path)), batch_size=4, workers=2)
    with pytest.raises(ConfigError, match="data.workers=2: expected 0"):
        other.load_state_dict([loader.state_dict()], iteration=1, rank=0)
    with pytest.raises(ConfigError, match="found none"):
        next(IterableLoader(hugging_face(json_files(tmp_path)), batch_size=40).batches(0))
    with pytest.raises(ConfigError, match="an epoch has no sample"):
        next(IterableLoader(lambda: iter(()), batch_size=1).batches(0))

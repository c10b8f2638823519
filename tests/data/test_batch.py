"""Moving and measuring batches of every shape."""

import dataclasses
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from distrain import Trainer
from distrain.data.batch import batch_length, to_channels_last, to_device
from distrain.errors import ConfigError

CPU = torch.device("cpu")
META = torch.device("meta")  # a device that every machine has
Pair = namedtuple("Pair", "left right")


def test_every_tensor_moves_and_every_container_keeps_its_kind() -> None:
    batch = {
        "images": torch.ones(2, 3),
        "parts": [torch.ones(1), (torch.ones(2), "name")],
        "pair": Pair(torch.ones(4), None),
    }
    moved = to_device(batch, META)
    assert moved["images"].device == META
    assert [*moved["images"].shape] == [2, 3]
    assert moved["parts"][0].device == moved["parts"][1][0].device == META
    assert moved["parts"][1][1] == "name"
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].left.device == META
    assert moved["pair"].right is None
    assert batch["images"].device == CPU


def test_what_is_there_already_is_not_touched() -> None:
    tensor = torch.ones(3)
    batch = [tensor, {"x": tensor}]
    assert to_device(batch, CPU) is batch
    assert to_device(tensor, CPU) is tensor
    there = torch.ones(3, device="meta")
    assert to_device([there], META)[0] is there


@dataclasses.dataclass
class Item:
    x: Tensor
    name: str = "a"
    length: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.length = torch.tensor(len(self.x))


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    y: list[Tensor]


class Graph:
    """Moves by itself, as a batch of torch_geometric does."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def to(self, device: torch.device, non_blocking: bool = False) -> "Graph":
        assert non_blocking
        return Graph(self.x.to(device))


class Instances(Graph):
    """Moves by itself; its method takes a device and nothing else."""

    def to(self, device: torch.device) -> "Instances":  # type: ignore[override]
        return Instances(self.x.to(device))


class InPlace(Graph):
    def to(self, device: torch.device, non_blocking: bool = False) -> None:  # type: ignore[override]
        self.x = self.x.to(device)


class Fields(OrderedDict):  # type: ignore[type-arg]
    """A dict with an attribute."""

    split = "none"


@pytest.mark.parametrize("make", [Graph, Instances, InPlace, Item, lambda x: Frozen(x, [x])])
@pytest.mark.parametrize("place", [lambda o: o, lambda o: [{"a": (o,)}], lambda o: Pair(o, 1)])
def test_objects_move(make, place) -> None:  # type: ignore[no-untyped-def]
    moved = to_device(place(make(torch.ones(2, 3))), META)
    while isinstance(moved, (list, tuple, dict)):
        moved = next(iter(moved.values())) if isinstance(moved, dict) else moved[0]
    assert type(moved) is type(make(torch.ones(1)))
    assert moved.x.device == META


def test_every_field_of_a_dataclass_moves() -> None:
    item = Item(torch.ones(3), name="b")
    item.extra = torch.ones(2)  # type: ignore[attr-defined]
    moved = to_device(item, META)
    assert (moved.x.device, moved.length.device, moved.extra.device) == (META, META, META)
    assert moved.name == "b"
    assert item.x.device == item.length.device == CPU
    frozen = to_device(Frozen(torch.ones(1), [torch.ones(1)]), META)
    assert frozen.x.device == frozen.y[0].device == META


def test_packed_sequences_move_and_count_their_sequences() -> None:
    packed = pack_sequence([torch.zeros(3), torch.zeros(2)])
    moved = to_device([packed], META)[0]
    assert moved.data.device == META
    assert moved.batch_sizes.tolist() == [2, 2, 1]
    assert batch_length(packed) == 2


def test_a_mapping_keeps_its_class_and_attributes() -> None:
    batch = Fields(x=torch.ones(2))
    batch.split = "train"
    moved = to_device(batch, META)
    assert (type(moved), moved.split, moved["x"].device) == (Fields, "train", META)
    assert batch["x"].device == CPU


@pytest.mark.parametrize(
    "batch",
    [
        SimpleNamespace(x=torch.ones(2)),
        SimpleNamespace(parts={"x": torch.ones(2)}),
        [SimpleNamespace(inner=SimpleNamespace(x=[torch.ones(2)]))],
        {"a": {torch.ones(2)}},
        Frozen(SimpleNamespace(x=torch.ones(2)), []),  # type: ignore[arg-type]
    ],
)
def test_an_object_whose_tensors_cannot_be_moved_is_refused(batch: object) -> None:
    with pytest.raises(ConfigError, match=r"got .*whose tensors cannot be moved to meta") as caught:
        to_device(batch, META)
    assert "\n" not in str(caught.value)


def test_values_without_tensors_stay() -> None:
    batch = ["a", 1, None, np.ones(2), SimpleNamespace(a=1), {1}, torch.float32, Item, b"x"]
    assert all(a is b for a, b in zip(to_device(batch, META), batch, strict=True))


def test_channels_last_keeps_every_container() -> None:
    images = torch.zeros(2, 3, 4, 4)
    for batch in (
        Pair(images, 1),
        Frozen(images, []),
        {"a": [images]},
        (images,),
        Fields(x=images),
    ):
        moved = to_channels_last(batch)
        assert type(moved) is type(batch)
    assert to_channels_last(Pair(images, 1)).left.stride() == (48, 1, 12, 3)
    assert to_channels_last(Frozen(images, [])).x.stride() == (48, 1, 12, 3)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(3, 4, 3)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """Return a loss."""
        return self.c(left).mean()


def test_named_tuples_train_in_channels_last() -> None:
    model = Convolution()
    data = [Pair(torch.ones(2, 3, 8, 8), torch.zeros(2))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Trainer(model, optimizer, data, channels_last=True).train(0, 2)


def test_a_single_tensor_comes_back_to_the_cpu() -> None:
    assert to_device(torch.ones(3), CPU).device == CPU


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(5),
        (torch.ones(5, 2), torch.ones(7)),
        OrderedDict(scale=torch.tensor(1.0), x=torch.ones(5)),
        {"names": ["a", "b"], "nested": [[], {"x": torch.ones(5)}]},
        Pair("text", torch.ones(5, 1)),
        Item(torch.ones(5)),
    ],
)
def test_the_length_is_that_of_the_first_tensor_with_a_dimension(batch: object) -> None:
    assert batch_length(batch) == 5


@pytest.mark.parametrize("batch", [torch.tensor(1.0), "text", [], {"x": ["a"]}, 3, None])
def test_nothing_to_count_is_said(batch: object) -> None:
    with pytest.raises(ValueError, match="one with a dimension of samples"):
        batch_length(batch)

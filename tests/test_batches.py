"""Moving and measuring batches of every shape."""

from collections import OrderedDict, namedtuple

import pytest
import torch

from distrain.batches import batch_length, to_device

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
    ],
)
def test_the_length_is_that_of_the_first_tensor_with_a_dimension(batch: object) -> None:
    assert batch_length(batch) == 5


@pytest.mark.parametrize("batch", [torch.tensor(1.0), "text", [], {"x": ["a"]}, 3, None])
def test_nothing_to_count_is_said(batch: object) -> None:
    with pytest.raises(ValueError, match="no tensor with a dimension"):
        batch_length(batch)

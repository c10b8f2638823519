"""Values that travel between ranks: exact, and never pickled."""

import ast
import contextlib
import math
import pickle
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from distrain.data.epoch_ends import lengths_of_ranks
from distrain.distributed.collectives import broadcast_from_main, gather_to_all, gather_to_main
from distrain.distributed.rng import random_states
from distrain.distributed.serialization import decode, encode

ROOT = Path(__file__).parents[2]
PICKLING = {name for name in dir(dist) if "_object" in name}  # all_gather_object and the like
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(LEAVES, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=20)


@given(VALUES)
def test_plain_values_are_exact(value) -> None:
    assert decode(encode(value)) == value


def test_floats_that_are_no_numbers_signs_and_tuples() -> None:
    nan, infinite, zero, pair = decode(encode((math.nan, -math.inf, -0.0, (1, "a"))))
    assert math.isnan(nan)
    assert infinite == -math.inf
    assert math.copysign(1, zero) == -1
    assert pair == [1, "a"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_tensors_and_arrays_keep_dtype_shape_and_bits(dtype, shape) -> None:
    tensor = torch.arange(6).reshape(2, 3).expand(2, 3)[: shape[0] if shape else None]
    tensor = torch.ones(shape).to(dtype) if shape != (2, 3) else tensor.t().to(dtype)
    array = np.arange(6, dtype=">u4")[::2]
    back = decode(encode({"t": tensor, "between": 1, "a": array}))
    assert back["t"].dtype == dtype
    assert torch.equal(back["t"], tensor)
    assert back["a"].dtype == array.dtype
    assert np.array_equal(back["a"], array)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1, {2}]}, r"value\.a\[1\]: .*set"),
        ({1: 2}, "value: .*dict"),
        ({"$array": 1}, "value: .*dict"),
        (np.array([object()]), "value: ndarray object"),
    ],
)
def test_what_does_not_travel_is_named(value, place) -> None:
    with pytest.raises(TypeError, match=f"{place}.* cannot be sent to other ranks"):
        encode(value)


@given(st.binary() | st.binary().map(lambda data: encode([torch.ones(3)])[:20] + data))
def test_bytes_that_are_no_value_are_an_error(data) -> None:
    with contextlib.suppress(ValueError):
        decode(data)


def test_ranks_exchange_values_without_pickle() -> None:
    def exchange(rank: int):
        def refuse(*_args, **_kwargs):
            raise AssertionError("pickled")

        mine = {"rank": rank, "text": "x" * 100 * rank, "rng": random_states()}
        with (
            patch.multiple(dist, **dict.fromkeys(PICKLING, refuse)),
            patch.object(pickle, "loads", refuse),
            patch.object(pickle, "Unpickler", refuse),
            patch("torch.distributed.distributed_c10d._unpickler", refuse),
        ):
            everyone = gather_to_all(mine)
            on_main = gather_to_main(mine)
            first = broadcast_from_main(["from", rank])
            lengths = lengths_of_ranks([None, 0, 2**40][rank])
        assert torch.equal(torch.as_tensor(everyone[rank]["rng"]["torch"]), torch.get_rng_state())
        assert np.array_equal(everyone[rank]["rng"]["numpy"]["keys"], np.random.get_state()[1])
        assert (on_main is None) == (rank != 0)
        assert lengths == [None, 0, 2**40]
        return [(each["rank"], len(each["text"])) for each in everyone], first

    assert run_ranks(exchange, 3) == [([(0, 0), (1, 100), (2, 200)], ["from", 0])] * 3


def test_no_collective_that_pickles_is_used() -> None:
    assert "all_gather_object" in PICKLING
    for folder in ("distrain", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    names = {alias.name for alias in node.names}
                else:
                    names = {node.attr} if isinstance(node, ast.Attribute) else set()
                assert names.isdisjoint(PICKLING), f"{path}:{node.lineno}"

"""States taken apart and put together again are the same to the last bit."""

import hashlib
import json
from collections import Counter, OrderedDict
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import pytest
import torch
from checkpoint_cases import bytes_of, identical, raw, small_state, state_digests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from distrain.checkpoint.decode import TORCH_DTYPES, decode
from distrain.checkpoint.encode import Snapshot, encode
from distrain.checkpoint.format import MODEL_FILE, TRAINING_FILE

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32),
    *(torch.uint64, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.float8_e4m3fnuz, torch.float8_e8m0fnu),
]
KEYS = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=4),
    st.sampled_from(["$tensor", "$dict", "", "a.b", "__metadata__", "perf/x", "0"]),
    st.integers(-3, 3),
    st.integers(),
)


def put_together(snapshot: Snapshot) -> dict:
    """Decode a snapshot that went through JSON text and raw bytes, as a checkpoint does."""
    stored = {}
    for file, name, dtype, shape, nbytes, source in snapshot.tensors:
        data = bytes_of(source).tobytes()
        assert len(data) == nbytes
        flat = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[:nbytes]
        kept = {"BOOL": "bool", "U8": "uint8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
        long = {"F": "float", "I": "int", "U": "uint", "C": "complex", "B": "bfloat"}
        text = kept.get(dtype) or long[dtype[0]] + dtype.lstrip("FIUCB")
        stored[file, name] = flat.view(TORCH_DTYPES[text]).reshape(shape)
    tree = json.loads(json.dumps(snapshot.tree, allow_nan=False))
    return decode(tree, lambda file, name: stored[file, name].clone(), torch.device("cpu"))


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    count = int(np.prod(shape, dtype=np.int64))
    high = 1 if dtype == torch.bool else 255
    values = draw(st.lists(st.integers(0, high), min_size=count * dtype.itemsize, max_size=None))
    values = values[: count * dtype.itemsize]
    flat = torch.tensor([*values, 0], dtype=torch.uint8)[:-1].clone().view(dtype)
    tensor = flat.reshape(shape)
    how = draw(st.sampled_from(["as is", "transposed", "strided", "expanded", "parameter"]))
    if how == "transposed" and len(shape) > 1:
        return tensor.permute(draw(st.permutations(range(len(shape)))))
    if how == "strided" and shape:
        return tensor[::2]
    if how == "expanded":
        return tensor.unsqueeze(0).expand(2, *shape)
    if how == "parameter":
        return nn.Parameter(tensor, requires_grad=False)
    return tensor


ARRAYS = hnp.arrays(
    st.one_of(
        hnp.integer_dtypes(endianness="?"),
        hnp.unsigned_integer_dtypes(endianness="?"),
        hnp.floating_dtypes(endianness="?"),
        hnp.complex_number_dtypes(endianness="?"),
        hnp.boolean_dtypes(),
    ),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3),
)
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=()), max_size=5),
    st.binary(max_size=5),
    tensors(),
    ARRAYS,
    ARRAYS.filter(lambda array: array.size > 0).map(lambda array: array.reshape(-1)[0]),
)
VALUES = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
        st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict),
        st.dictionaries(KEYS, st.integers(), max_size=3).map(Counter),
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(["model", "optimizer", "hooks", "x y"]), VALUES))
def test_any_state_comes_back_exactly(state: dict) -> None:
    assert identical(state, put_together(encode(state)))


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(["model", "optimizer"]), VALUES))
def test_digests_of_what_came_back_are_the_same(state: dict) -> None:
    assert state_digests(state) == state_digests(put_together(encode(state)))


def test_the_everyday_state_comes_back_exactly() -> None:
    state = small_state(3)
    back = put_together(encode(state))
    assert identical(state, back)
    assert back["model"]._metadata == state["model"]._metadata
    assert type(back["schedule"]["milestones"]) is Counter


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -0.0, 5e-324])
def test_floats_that_json_has_no_word_for(value: float) -> None:
    assert identical({"a": value}, put_together(encode({"a": value})))


def test_half_pairs_of_surrogates_do_not_join() -> None:
    text = "\ud83d\ude00"  # two halves; as JSON text they would come back as one character
    state = {"a": {text: text}}
    back = put_together(encode(state))
    assert back == state
    assert len(back["a"][text]) == 2


def test_channels_last_comes_back_as_channels_last() -> None:
    weight = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)
    weight = weight.contiguous(memory_format=torch.channels_last)
    snapshot = encode({"model": {"weight": weight}})
    assert snapshot.tree["model"]["weight"]["order"] == [0, 2, 3, 1]
    back = put_together(snapshot)["model"]["weight"]
    assert torch.equal(back, weight)
    assert back.stride() == weight.stride()


def test_the_model_file_has_the_names_of_the_state_dict() -> None:
    snapshot = encode(small_state())
    model = [t.name for t in snapshot.tensors if t.file == MODEL_FILE]
    assert model == list(small_state()["model"])
    rest = {t.name for t in snapshot.tensors if t.file == TRAINING_FILE}
    assert {"optimizer.state.0.exp_avg", "rng.torch", "histories.loss.values"} <= rest


def test_paths_that_look_alike_get_names_of_their_own() -> None:
    one, two, three = torch.ones(1), torch.ones(2), torch.ones(3)
    state = {
        "x": {"a.b": one, "a": {"b": two}, 0: one, "0": two, "\ud800": three, "?": two},
        "model": {"__metadata__": one},
    }
    snapshot = encode(state)
    names = [(t.file, t.name) for t in snapshot.tensors]
    assert len(set(names)) == len(names)
    assert (MODEL_FILE, "__metadata__") not in names
    assert identical(state, put_together(snapshot))


class Color(IntEnum):
    RED = 1


class Pair(NamedTuple):
    a: int


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ({1, 2}, "builtins.set"),
        (Color.RED, "Color"),
        (Pair(1), "Pair"),
        (torch.float32, "torch.dtype"),
        (torch.device("cpu"), "torch.device"),
        (print, "builtin_function"),
        (complex(1, 2), "builtins.complex"),
        (np.array(["a"]), "dtype <U1"),
        (np.array([None]), "dtype object"),
        (np.datetime64("2020-01-01"), "dtype datetime64"),
        (torch.eye(2).to_sparse(), "torch.sparse_coo"),
        (torch.empty(2, device="meta"), "on meta"),
        (torch.zeros(8, dtype=torch.uint8).view(torch.uint4), "uint4"),
        ({2.5: 1}, "the key 2.5 of type float"),
        ({True: 1}, "the key True of type bool"),
        ({(1, 2): 1}, "the key (1, 2) of type tuple"),
    ],
)
def test_other_types_are_refused_by_path(value: object, what: str) -> None:
    with pytest.raises(TypeError) as caught:
        encode({"hooks": {"mine": [1, {"deep": value}]}})
    assert "hooks.mine.1.deep" in str(caught.value)
    assert what in str(caught.value)
    assert "allowed: dict" in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_nested_tensors_are_refused() -> None:
    with pytest.raises(TypeError, match=r"at x: a float32 tensor of layout"):
        encode({"x": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])})


def test_what_holds_itself_is_refused() -> None:
    state: dict = {"a": []}
    state["a"].append(state["a"])
    with pytest.raises(TypeError, match=r"a\.0\.0.*nested in itself"):
        encode(state)


@pytest.mark.parametrize("part", [1, "", "$tensor"])
def test_parts_have_plain_names(part: object) -> None:
    with pytest.raises(TypeError, match="cannot name a part"):
        encode({part: 1})  # type: ignore[dict-item]


def test_digest_worked_by_hand() -> None:
    weight = torch.tensor([1.0, 2.0])
    of_bytes = hashlib.sha256(raw(weight)).hexdigest()
    text = '{"b":[1,{"$tuple":[]}],"w":{"$tensor":"HASH","dtype":"float32","shape":[2]}}'
    text = text.replace("HASH", of_bytes)
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert state_digests({"x": {"w": weight, "b": [1, ()]}}) == {"x": expected}


def test_digests_do_not_depend_on_layout() -> None:
    a, b = torch.randn(4, 4), torch.randn(3)
    one = {"model": {"a": a, "b": b}, "s": {1: a, 2: b}}
    two = {"s": {2: b.clone(), 1: a.t().contiguous().t()}, "model": {"b": b, "a": a}}
    assert state_digests(one) == state_digests(two)


@pytest.mark.parametrize(
    "other",
    [
        {"x": (1, 2)},
        {"x": [1.0, 2]},
        {"x": {"0": 1, "1": 2}},
        {"x": {0: 1, 1: 2}},
        {"x": torch.tensor([1, 2])},
        {"x": torch.tensor([[1, 2]])},
        {"x": torch.tensor([1, 2], dtype=torch.int32)},
        {"x": np.array([1, 2])},
        {"x": [1, 2, None]},
    ],
)
def test_digests_tell_what_differs(other: dict) -> None:
    assert state_digests({"x": [1, 2]}) != state_digests(other)
    assert state_digests(other) == state_digests(other)


def test_histories_measured_on_the_clock_are_left_out() -> None:
    loss = {"values": np.array([1.0])}
    clock = {"values": np.array([9.0])}
    plain = state_digests({"histories": {"loss": loss}})
    for name in ("perf/step_s", "gpu/memory", "straggler/rank"):
        assert state_digests({"histories": {"loss": loss, name: clock}}) == plain
        assert state_digests({"histories": {name: clock, "loss": loss, 1: 2}}) == state_digests(
            {"histories": {"loss": loss, 1: 2}}
        )
    assert state_digests({"histories": {"loss": loss, "performance": clock}}) != plain
    assert state_digests({"hooks": {"perf/x": 1}}) != state_digests({"hooks": {}})

import math

import numpy as np
import pytest
import torch

from distrain import EventStorage, get_event_storage
from distrain.histogram import count_values


def test_the_seed_example_prints_these_dictionaries():
    seen = []
    with EventStorage(0) as storage:
        for i in range(10):
            storage.put_scalars(loss=i * 10, metric=i * 5)
            storage.put_scalar("lr", i)
            seen.append(get_event_storage().latest())
    assert seen[0] == {"loss": 0.0, "metric": 0.0, "lr": 0.0}
    assert seen[1] == {"loss": 10.0, "metric": 5.0, "lr": 1.0}
    assert seen[9] == {"loss": 90.0, "metric": 45.0, "lr": 9.0}
    assert storage.history("loss").values() == [(i * 10.0, 0) for i in range(10)]


def test_storages_nest_and_outside_there_is_none():
    with EventStorage(0) as outer:
        with EventStorage(5) as inner:
            assert get_event_storage() is inner
            assert inner.iter == 5
        assert get_event_storage() is outer
    with pytest.raises(RuntimeError, match="no EventStorage"):
        get_event_storage()


def test_step_moves_on():
    storage = EventStorage(3)
    storage.put_scalar("a", 1.0)
    storage.step()
    storage.put_scalar("a", 2.0)
    assert storage.iter == 4
    assert storage.history("a").values() == [(1.0, 3), (2.0, 4)]


def test_a_tensor_overwritten_later_does_not_change_what_was_put():
    storage = EventStorage(0)
    one, two, three = torch.tensor(1.0), torch.tensor(2.0), torch.tensor([3.0])
    storage.put_scalar("one", one)
    storage.put_scalars(two=two, three=three, four=4.0)
    for tensor in (one, two, three):
        tensor.fill_(-1.0)
    assert storage.latest() == {"one": 1.0, "two": 2.0, "three": 3.0, "four": 4.0}


def test_a_put_tensor_keeps_no_graph():
    storage = EventStorage(0)
    loss = torch.ones((), requires_grad=True) * 2
    storage.put_scalars(loss=loss, other=loss * 2)
    storage.put_scalar("alone", loss)
    assert not any(block.requires_grad for row in storage.take_rows() for block in row.blocks)


def test_tensors_of_several_types_are_kept_exactly():
    storage = EventStorage(0)
    storage.put_scalars(
        big=torch.tensor(2**53, dtype=torch.int64),
        half=torch.tensor(0.5, dtype=torch.bfloat16),
        double=torch.tensor(0.1, dtype=torch.float64),
    )
    assert storage.latest() == {"big": 2.0**53, "half": 0.5, "double": 0.1}


def test_smoothing_hint_chooses_median_or_latest():
    storage = EventStorage(0)
    for value in (1.0, 9.0, 2.0):
        storage.put_scalar("smooth", value)
        storage.put_scalar("exact", value, smoothing_hint=False)
        storage.step()
    assert storage.latest_with_smoothing_hint(3) == {"smooth": 2.0, "exact": 2.0}
    assert storage.latest_with_smoothing_hint(2) == {"smooth": 5.5, "exact": 2.0}
    assert storage.scalars_until(1, window_size=2) == {"smooth": (5.0, 1), "exact": (9.0, 1)}


def test_name_scopes_nest():
    storage = EventStorage(0)
    with storage.name_scope("head"), storage.name_scope("box"):
        storage.put_scalar("loss", 1.0)
        storage.put_scalars(iou=2.0)
    assert storage.latest() == {"head/box/loss": 1.0, "head/box/iou": 2.0}


@pytest.mark.parametrize(
    ("put", "message"),
    [
        (lambda s: s.put_scalar("a", torch.zeros(2)), r"a: .*one element.*\[2\]"),
        (lambda s: s.put_scalars(a=1.0, b=torch.zeros(3)), r"b: .*one element"),
        (lambda s: s.put_scalar("a", 1.0, reduce="median"), "choose one of"),
        (lambda s: s.put_image("i", np.zeros((4, 5, 6))), r"image 'i' has shape \(4, 5, 6\)"),
    ],
)
def test_what_cannot_be_put_is_named(put, message):
    with pytest.raises(ValueError, match=message):
        put(EventStorage(0))


def test_a_name_has_one_kind():
    storage = EventStorage(0)
    storage.put_scalar("a", 1.0)
    with pytest.raises(ValueError, match="another name"):
        storage.put_scalar("a", 1.0, reduce="max")


def test_unknown_history_names_those_there_are():
    storage = EventStorage(0)
    storage.put_scalar("loss", 1.0)
    with pytest.raises(KeyError, match="loss"):
        storage.history("los")


def test_images_are_kept_until_cleared():
    storage = EventStorage(2)
    storage.put_image("image", torch.zeros(3, 4, 5))
    [(name, image, iteration)] = storage.vis_data()
    assert (name, image.shape, iteration) == ("image", (3, 4, 5), 2)
    storage.clear_images()
    assert storage.vis_data() == []


def test_histogram_counts():
    storage = EventStorage(0)
    storage.put_histogram("h", torch.tensor([0.0, 0.0, 1.0, 4.0]), bins=4)
    [(_, histogram, _)] = storage.histograms()
    assert histogram.counts.tolist() == [2, 1, 0, 1]
    assert histogram.edges.tolist() == [0, 1, 2, 3, 4]
    assert (histogram.min, histogram.max, histogram.sum) == (0, 4, 5)
    assert (histogram.sum_squares, histogram.num) == (17, 4)


def test_histogram_of_one_value_has_a_width():
    histogram = count_values(torch.full((5,), 3.0), bins=2).read()
    assert histogram.counts.sum() == 5
    assert histogram.edges.tolist() == [3.0, 3.5, 4.0]


def test_state_round_trip():
    storage = EventStorage(0)
    storage.put_scalar("a", math.pi, smoothing_hint=False, reduce="max")
    other = EventStorage(0)
    other.load_state_dict(storage.state_dict())
    assert other.history("a").values() == [(math.pi, 0)]
    assert other.kinds == storage.kinds


def test_alone_it_stays_bounded():
    storage = EventStorage(0)
    for _ in range(5_000):
        storage.put_scalar("a", 1.0)
        storage.step()
    assert len(storage._rows) <= 1_002

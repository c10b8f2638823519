import math

import numpy as np
import pytest
import torch

from distrain import EventStorage, get_event_storage
from distrain.events.histogram import count_values
from distrain.events.history_store import Block, Histories
from distrain.events.pending import ScalarKind, common_device, stack
from distrain.events.reduction import ScalarReduction

kind_c = ScalarKind("mean", True)


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


@pytest.mark.parametrize("shapes", [[(), ()], [(1,), (1,)], [(1, 1), (1, 1)], [(), (1,)]])
def test_one_element_may_have_any_shape(shapes):
    storage = EventStorage()
    storage.put_scalars(a=torch.full(shapes[0], 2.0), b=torch.full(shapes[1], 3.0))
    storage.put_scalars(c=torch.full(shapes[0], 4.0), d=5.0)
    assert storage.latest() == {"a": 2.0, "b": 3.0, "c": 4.0, "d": 5.0}


def test_tensors_of_several_devices_meet_off_the_host():
    here, there = torch.zeros(()), torch.zeros((), device="meta")
    assert [common_device(t).type for t in ([here], [here, there])] == ["cpu", "meta"]
    assert stack({"a": here, "b": there}).device.type == "meta"


def test_a_tensor_of_more_elements_is_named_among_others_alike():
    with pytest.raises(ValueError, match=r"a: .*one element.*\[2\]"):
        EventStorage().put_scalars(a=torch.zeros(2), b=torch.zeros(2))


def test_smoothing_hint_chooses_median_or_latest():
    storage = EventStorage(0)
    for value in (1.0, 9.0, 2.0):
        storage.put_scalar("smooth", value)
        storage.put_scalar("exact", value, smoothing_hint=False)
        storage.step()
    assert storage.latest_with_smoothing_hint(3) == {"smooth": 2.0, "exact": 2.0}
    assert storage.latest_with_smoothing_hint(2) == {"smooth": 5.5, "exact": 2.0}
    assert storage.scalars_until(1, window_size=2) == {"smooth": (5.0, 1), "exact": (9.0, 1)}


def test_a_median_is_over_iterations_not_over_values():
    storage = EventStorage(0)
    for value in range(7):  # in iterations 0, 10, ... 60
        storage.put_scalar("a", 100.0 if value < 5 else float(value))
        storage.iter += 10
    assert storage.latest_with_smoothing_hint(20) == {"a": 5.5}  # of iterations 41 to 60
    assert storage.scalars_until(59, window_size=20) == {"a": (52.5, 50)}  # 40 to 59
    assert storage.scalars_until(60, window_size=9) == {"a": (6.0, 60)}
    assert storage.scalars_until(100, window_size=20) == {"a": (6.0, 60)}  # none: the newest
    assert storage.history("a").median(4) == 53.0  # a history counts values


def test_one_may_ask_for_medians_of_several_windows():
    storage = EventStorage(0)
    for value in (1.0, 9.0, 2.0, 6.0):
        storage.put_scalar("a", value)
        storage.step()
    for size, median in ((1, 6.0), (2, 4.0), (3, 6.0), (4, 4.0), (1, 6.0)):
        assert storage.scalars_until(3, window_size=size) == {"a": (median, 3)}
        assert storage.scalars_until_each([3], window_size=size) == [{"a": (median, 3)}]


def test_rows_of_scalars_that_are_put_now_and_then_equal_a_plain_median():
    draw = np.random.default_rng(0)
    storage = EventStorage(0)
    ScalarReduction(storage, period=4, first_iter=0)
    storage.fold_arrived = None
    put = {"a": [], "b": []}
    for start in range(0, 400, 8):
        for name in put:
            at = start + np.flatnonzero(draw.random(8) < 0.2)
            values = draw.random((len(at), 1))
            put[name] += zip(at.tolist(), values[:, 0].tolist(), strict=True)
            if len(at):
                storage.fold(Block((name,), values, at), {"a": kind_c, "b": kind_c})
        if draw.random() < 0.2:
            storage.histories()  # as a checkpoint does
        dues = [start + 3, start + 7]
        for rows in rows_of(storage, dues):
            for due, row in zip(dues, rows, strict=True):
                expected = {}
                for name, pairs in put.items():
                    until = [(i, value) for i, value in pairs if i <= due]
                    if until:
                        in_window = [value for i, value in until if i > due - 4]
                        value = np.median(in_window) if in_window else until[-1][1]
                        expected[name] = (value, until[-1][0])
                assert row == expected


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
        (lambda s: s.put_scalar("a", 1.0, reduce="median"), "expected one of"),
        (
            lambda s: s.put_scalar("a", 1.0, count=-1),
            "a: count=-1.0: expected a finite number >= 0",
        ),
        (lambda s: s.put_scalars(a=1.0, count=math.nan), "a: count=nan: expected a finite number"),
        # metrics.jsonl would show it as the row's, and a resumed run drop all rows
        (lambda s: s.put_scalar("iteration", 5.0), "iteration: .* use another name"),
        (lambda s: s.put_scalars(iteration=5.0), "iteration: .* use another name"),
        (
            lambda s: s.put_image("i", np.zeros((4, 5, 6))),
            r"image 'i': expected shape .*not \(4, 5, 6\)",
        ),
    ],
)
def test_what_cannot_be_put_is_named(put, message):
    with pytest.raises(ValueError, match=message):
        put(EventStorage(0))


def test_a_second_put_replaces_the_count_too():
    storage = EventStorage(0)
    storage.is_reduced_by_trainer = True
    storage.put_scalars(a=1.0, b=1.0, c=1.0, count=3)
    storage.put_scalar("a", 2.0)
    storage.put_scalars(b=2.0)
    assert storage.take_rows()[0].counts == {"c": 3.0}


def test_a_name_has_one_kind():
    storage = EventStorage(0)
    storage.put_scalar("a", 1.0)
    with pytest.raises(ValueError, match="another name"):
        storage.put_scalar("a", 1.0, reduce="max")


def test_a_resumed_run_may_put_a_scalar_as_a_loss():
    # grad_norm of the Histograms hook, and then with trainer.clip_norm
    before, storage = EventStorage(0), EventStorage(1)
    before.put_scalar("grad_norm", 1.0)
    storage.load_state_dict(before.state_dict())
    storage.put_losses({"grad_norm": torch.ones(())})
    assert storage.kinds["grad_norm"].is_loss
    with pytest.raises(ValueError, match="another name"):
        storage.put_scalar("grad_norm", 1.0, reduce="max")


def test_scalars_that_are_dropped_leave_all_others_as_they_are(caplog):
    with EventStorage(0) as storage:
        storage.put_scalar("x", 1.0)
        with storage.scalars_dropped():
            assert storage.history("x").latest() == 1.0
            storage.put_scalar("x", 2.0, smoothing_hint=False)  # other settings than outside
            with storage.scalars_dropped(), storage.name_scope("a"):
                storage.put_losses({"y": torch.ones(())})
            storage.step()
            storage.put_scalars(z=3.0)
            local = {"of_rank_1": ScalarKind("local", True)}
            storage.fold(Block(("of_rank_1",), np.zeros((1, 1)), np.array([1])), local)
        storage.put_scalar("x", 4.0)
        assert storage.histories().keys() == {"x", "of_rank_1"}
        assert storage.history("x").values() == [(1.0, 0), (4.0, 1)]
        assert storage.state_dict().keys() == {"x", "of_rank_1"}
    assert [record.args for record in caplog.records] == [("a/y",), ("z",)]


def test_a_window_that_is_taken_while_scalars_are_dropped_is_complete():
    storage = EventStorage(0)
    storage.is_reduced_by_trainer = True
    storage.put_scalar("x", 1.0)
    with storage.scalars_dropped():
        storage.put_scalar("x", 2.0)
        (row,) = storage.take_rows()
    storage.put_scalar("y", 3.0)
    assert [row.read(), storage.take_rows()[0].read()] == [{"x": 1.0}, {"y": 3.0}]


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


def rows_of(storage, iterations):
    """Return what both ways of asking say."""
    return (
        storage.scalars_until_each(iterations, window_size=4),
        [storage.scalars_until(iteration, window_size=4) for iteration in iterations],
    )


def test_rows_of_several_windows_at_once_are_those_one_by_one():
    storage = EventStorage(0)
    ScalarReduction(storage, period=4, first_iter=0)  # somebody else folds
    storage.fold_arrived = None
    kinds = {"a": ScalarKind("mean", True), "b": ScalarKind("mean", False), "c": kind_c}
    draw = np.random.default_rng(0)
    for start in range(0, 24, 4):
        at = np.arange(start, start + 4)
        storage.fold(Block(("a", "b"), draw.random((4, 2)), at), kinds)
        if start == 8:
            storage.fold(Block(("c",), np.array([[7.0]]), np.array([9])), kinds)
        if start == 12:
            storage.histories()
        at_once, one_by_one = rows_of(storage, [start + 3])
        assert at_once == one_by_one
    at_once, one_by_one = rows_of(storage, [19, 23])
    assert at_once == one_by_one
    assert at_once[0]["c"] == (7.0, 9)
    assert at_once[1]["a"][0] == np.median([v for v, _ in storage.history("a").values()][-4:])
    assert rows_of(storage, [7, 11])[0] == rows_of(storage, [7, 11])[1]  # long in the buffers
    assert "c" not in rows_of(storage, [7, 11])[0][0]


def test_rows_are_never_read_one_by_one_while_other_names_move(monkeypatch):
    """In the middle of a run, such a window once cost 50 to 150 ms."""
    kinds = {name: ScalarKind("mean", True) for name in "abc"}
    histories = Histories(kinds)
    monkeypatch.setattr(histories, "until", None)
    draw = np.random.default_rng(0)
    values = draw.random((9_000, 3))
    histories.append(Block(("c",), values[:100, 2:], np.arange(100)))  # it is a window ahead
    for start in range(100, 9_000, 100):  # more than wait at once
        at = np.arange(start, start + 100)
        histories.append(Block(("a", "b"), values[start : start + 100, :2], at))
        histories.append(Block(("c",), values[start : start + 100, 2:], at))
        dues = [*range(start + 19, start + 100, 20)]
        for due, row in zip(dues, histories.until_each(dues, window_size=20), strict=True):
            medians = np.median(values[due - 19 : due + 1], axis=0).tolist()
            assert row == {name: (m, due) for name, m in zip("abc", medians, strict=True)}
    for column, name in enumerate("abc"):
        begin = 0 if name == "c" else 100
        assert np.array_equal(histories.buffers()[name].arrays()[0], values[begin:, column])


def test_a_row_with_nan_or_infinity_is_told_as_it_is():
    storage = EventStorage(0)
    ScalarReduction(storage, period=4, first_iter=0)
    storage.fold_arrived = None
    values = np.array([[1.0, math.nan], [math.inf, 2.0], [3.0, 2.0], [2.0, 2.0]] * 2)
    storage.fold(Block(("a", "n"), values, np.arange(8)), dict.fromkeys(("a", "n"), kind_c))
    for row, at in zip(rows_of(storage, [3, 7])[0], (3, 7), strict=True):
        assert row["a"] == (2.5, at)
        assert math.isnan(row["n"][0])


def test_rows_that_a_checkpoint_moved_into_the_buffers_are_told_as_they_were():
    storage = EventStorage(0)
    ScalarReduction(storage, period=4, first_iter=0)
    storage.fold_arrived = None
    values = np.arange(12.0)[:, None]
    storage.fold(Block(("a",), values, np.arange(12)), {"a": ScalarKind("mean", False)})
    storage.histories()
    rows, one_by_one = rows_of(storage, [3, 7, 11])
    assert rows == one_by_one == [{"a": (3.0, 3)}, {"a": (7.0, 7)}, {"a": (11.0, 11)}]

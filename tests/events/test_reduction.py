"""Scalars over ranks, on real ranks, against numbers worked out by hand and by a plain gather."""

import math
import random
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from distrain.distributed.ranks import default_store, new_cpu_group
from distrain.errors import NonFiniteLoss
from distrain.events.reduction import STOP_EARLY, STOP_REQUESTED, ScalarReduction
from distrain.events.storage import EventStorage

pytestmark = pytest.mark.ranks


def reduction_of(storage, rank, *, period=5, first_iter=0):
    return ScalarReduction(
        storage,
        period=period,
        first_iter=first_iter,
        rank=rank,
        world_size=dist.get_world_size(),
        group=new_cpu_group(),
        store=default_store(),
    )


def run(storage, reduction, iterations, put):
    """The loop's order of calls; returns the iteration after which all agreed to stop."""
    for i in iterations:
        storage.iter = i
        put(i)
        reduction.advance(i)
        reduction.close_if_due(i)
        if reduction.stop:
            return i
    reduction.drain(iterations[-1])
    return None


def every_operation(rank):
    storage = EventStorage(0)
    reduction = reduction_of(storage, rank)

    def put(i):
        storage.put_scalars(loss=torch.tensor(float(i + rank)), plain=rank / 4)
        storage.put_scalar("sum", float(rank + 1), reduce="sum")
        storage.put_scalar("max", 0.1 * rank, reduce="max")
        storage.put_scalar("min", torch.tensor(-rank), reduce="min")
        storage.put_scalar("local", float(10 * i + rank), reduce="local")
        storage.put_scalar("weighted", float(rank), count=rank + 1)
        if rank == 1 and i % 3 == 0:
            storage.put_scalar("sometimes", float(i))

    run(storage, reduction, range(13), put)
    spread = storage.spread("loss")
    return {name: h.values() for name, h in storage.histories().items()}, spread


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_iteration_of_every_operation(world_size):
    results = run_ranks(every_operation, world_size)
    ranks = range(world_size)
    mean = sum(ranks) / world_size
    total = sum(r + 1 for r in ranks)
    for rank, (values, spread) in enumerate(results):
        assert values["loss"] == [(i + mean, i) for i in range(13)]
        assert values["plain"] == [(mean / 4, i) for i in range(13)]
        assert values["sum"] == [(float(total), i) for i in range(13)]
        assert values["max"] == [(0.1 * (world_size - 1), i) for i in range(13)]
        assert values["min"] == [(-(world_size - 1.0), i) for i in range(13)]
        assert values["local"] == [(10.0 * i + rank, i) for i in range(13)]
        weighted = sum(r * (r + 1) for r in ranks) / total
        assert values["weighted"] == [(weighted, i) for i in range(13)]
        assert values["sometimes"] == [(float(i), i) for i in (0, 3, 6, 9, 12)]
        assert (spread.min_rank, spread.max_rank) == (0, world_size - 1)
        assert spread.max - spread.min == world_size - 1


def test_one_rank_needs_no_process_group():
    storage = EventStorage(0)
    reduction = ScalarReduction(storage, period=4, first_iter=0)

    def put(i):
        storage.put_scalars(a=float(i), b=torch.tensor(i))
        if i == 6:
            storage.put_scalar("late", 1.0)

    run(storage, reduction, range(10), put)
    assert storage.history("a").values() == [(float(i), i) for i in range(10)]
    assert storage.history("b").values() == [(float(i), i) for i in range(10)]
    assert storage.history("late").values() == [(1.0, 6)]


def nan_on_one_rank(rank):
    storage = EventStorage(0)
    reduction = reduction_of(storage, rank)

    def put(i):
        bad = rank in (1, 2) and i >= 7
        storage.put_losses({"loss": torch.tensor(math.nan if bad else 1.0)})
        storage.put_scalar("max", math.nan if rank == 2 else 1.0, reduce="max")
        storage.put_scalar("min", math.nan if rank == 2 else 1.0, reduce="min")

    try:
        run(storage, reduction, range(50), put)
    except NonFiniteLoss as error:
        return (
            storage.iter,
            str(error),
            storage.history("max").latest(),
            storage.history("min").latest(),
        )
    return None


def test_a_loss_that_is_not_finite_ends_all_ranks_at_one_iteration():
    results = run_ranks(nan_on_one_rank, 4)
    assert len({iteration for iteration, *_ in results}) == 1
    assert len({message for _, message, *_ in results}) == 1
    message = results[0][1]
    assert "loss not finite from iteration 7 on, on rank 1, 2 of 4" in message
    assert all(math.isnan(largest) and math.isnan(least) for *_, largest, least in results)


def stop_asked(rank, step_s, asked_at=None, requested_at=None):
    """Rank 1 of all asks; the clock shows `step_s` per step."""
    now_s = 0.0
    sys.modules[ScalarReduction.__module__].time = SimpleNamespace(perf_counter=lambda: now_s)
    storage = EventStorage(0)
    reduction = reduction_of(storage, rank, period=20)

    def put(i):
        nonlocal now_s
        now_s += step_s
        storage.put_scalar("a", float(i))
        if rank == 1 and i == asked_at:
            storage.early_stop = True
        if rank == 1 and i == requested_at:
            reduction.stop_request = STOP_REQUESTED

    return run(storage, reduction, range(200), put), reduction.stop


@pytest.mark.parametrize("step_s", [1e-6, 0.001, 0.12, 0.6])  # windows of a second and of a step
@pytest.mark.parametrize(("asked_at", "expected"), [(0, 19), (7, 19), (19, 19), (21, 39)])
def test_an_early_stop_comes_where_its_period_ends_whatever_the_clock(asked_at, expected, step_s):
    assert run_ranks(stop_asked, 2, step_s, asked_at) == [(expected, STOP_EARLY)] * 2


def test_an_early_stop_counts_more_than_a_request_of_the_same_iteration():
    """The run is over: it is not to be started again."""
    assert run_ranks(stop_asked, 2, 0.6, 7, requested_at=19) == [(19, STOP_EARLY)] * 2


@pytest.mark.parametrize("step_s", [1e-6, 0.001])
@pytest.mark.parametrize(("requested_at", "expected"), [(19, 19), (33, 39), (199, 199)])
def test_fast_steps_stop_where_the_period_ends_in_which_any_rank_was_asked(
    requested_at, expected, step_s
):
    stops = run_ranks(stop_asked, 3, step_s, requested_at=requested_at)
    assert stops == [(expected, STOP_REQUESTED)] * 3


def slow_steps(rank):
    storage = EventStorage(0)
    reduction = reduction_of(storage, rank, period=20)

    def put(i):
        time.sleep(0.6)
        if i == 2 and rank == 1:
            reduction.stop_request = STOP_REQUESTED

    return run(storage, reduction, range(50), put)


def test_slow_steps_stop_after_the_step_in_which_it_was_asked():
    assert run_ranks(slow_steps, 2) == [2, 2]


def one_name_of_two_kinds(rank):
    storage = EventStorage(0)
    reduction = reduction_of(storage, rank)

    def put(i):
        storage.put_scalar("a", 1.0, reduce="max" if rank else "mean")

    try:
        run(storage, reduction, range(9), put)
    except ValueError as error:
        return str(error)
    return None


def test_a_name_put_in_two_ways_is_an_error_on_all_ranks():
    for message in run_ranks(one_name_of_two_kinds, 2):
        assert message is not None
        assert message.startswith("a: one rank put it as")


def random_names_with_a_gather(rank, windows):
    """Put random subsets of names; compare with a gather of everything."""
    draw = random.Random(rank)
    storage = EventStorage(0)
    reduction = reduction_of(storage, rank, period=3)
    mine = []

    def put(i):
        for name in draw.sample("abcdefgh", draw.randrange(0, 9)):
            name = f"{name}{i // 300}"  # new names all along
            value = draw.choice([float(draw.randrange(100)), draw.random()])
            count = draw.choice([None, 1, 3])
            tensor = draw.random() < 0.3
            storage.put_scalar(name, torch.tensor(value) if tensor else value, count=count)
            mine.append((name, i, float(torch.tensor(value)) if tensor else value, count or 1))

    run(storage, reduction, range(3 * windows), put)
    everything = [None] * dist.get_world_size()
    dist.all_gather_object(everything, mine)
    sums: dict = {}
    for name, i, value, count in (entry for rows in everything for entry in rows):
        total, weight = sums.get((name, i), (0.0, 0.0))
        sums[name, i] = (total + value * count, weight + count)
    found = {(name, i): value for name, h in storage.histories().items() for value, i in h.values()}
    assert found.keys() == sums.keys()
    for key, (total, weight) in sums.items():
        assert math.isclose(found[key], total / weight, rel_tol=1e-12)
    return sum(len(h.values()) for h in storage.histories().values())


@pytest.mark.parametrize(
    ("windows", "together_s"),
    [(400, 0.0), (400, 1.0), pytest.param(10_000, 0.0, marks=pytest.mark.slow)],
)
def test_random_names_on_random_ranks_equal_a_gather(monkeypatch, windows, together_s):
    monkeypatch.setattr(
        "distrain.events.reduction._TARGET_WINDOW_S", together_s
    )  # 0: each window is short
    first, *others = run_ranks(random_names_with_a_gather, 4, windows, timeout_s=280)
    assert first > 1_000
    assert all(other == first for other in others)


class CountReadBacks(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in str(func) or "is_nonzero" in str(func):
            self.count += 1
        return func(*args, **(kwargs or {}))


EARLY_STOPS = dict.fromkeys([19, 39, 59, 79, 99], 1)  # agreed on where a period of 20 ends


def count_collectives(rank, num_scalars, step_s):
    """Return the collectives and read-backs of each iteration, counted below the Python API."""
    module = sys.modules[ScalarReduction.__module__]
    now_s = 0.0
    module.time = SimpleNamespace(perf_counter=lambda: now_s)
    counts: Counter = Counter()
    names = [
        name for name in dir(dist) if name.startswith(("all_", "broadcast", "gather", "reduce"))
    ]
    storage = EventStorage(0)
    reduction = reduction_of(storage, rank, period=20)

    def counted(function):
        def call(*args, **kwargs):
            counts[storage.iter] += 1
            return function(*args, **kwargs)

        return call

    for name in [*names, "barrier", "scatter", "send", "recv"]:
        if callable(getattr(dist, name, None)):
            setattr(dist, name, counted(getattr(dist, name)))
    tensors = {f"t{k}": torch.tensor(float(k)) for k in range(num_scalars)}

    def put(i):
        storage.put_scalars(**tensors)
        storage.put_scalar("float", 1.0)

    read_backs = CountReadBacks()
    with read_backs:
        for i in range(100):
            now_s += step_s
            storage.iter = i
            put(i)
            reduction.advance(i)
            reduction.close_if_due(i)
    return dict(counts), read_backs.count


@pytest.mark.parametrize("num_scalars", [1, 30, 300])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_an_ordinary_step_has_no_collective_and_no_read_back(num_scalars, world_size):
    for counts, read_backs in run_ranks(count_collectives, world_size, num_scalars, step_s=0.05):
        assert read_backs == 0
        if world_size == 1:
            assert counts == {}
        else:
            # the first window is the first iteration; each later one is sent a step after its end
            windows = {0: 2, 20: 2, 40: 2, 60: 2, 80: 2}
            assert counts == windows | EARLY_STOPS


@pytest.mark.parametrize(
    ("step_s", "sent_at"),
    [
        (0.6, [*range(0, 20, 2), *range(19, 100, 2)]),  # 1.5 s at most, and waited for at once
        (0.1, [0, 16, 20, 35, 40, 55, 60, 75, 80, 95]),  # 1.5 s, or what is left of the period
        (0.024, [0, 40, 80]),  # as many periods as pass in a second
    ],
)
def test_windows_last_as_long_as_a_step_lets_them(step_s, sent_at):
    for counts, _ in run_ranks(count_collectives, 2, 30, step_s):
        assert counts == Counter(dict.fromkeys(sent_at, 2)) + Counter(EARLY_STOPS)


def test_windows_that_nobody_asks_for_do_not_pile_up(monkeypatch):
    now_s = 0.0
    module = sys.modules[ScalarReduction.__module__]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now_s))
    storage = EventStorage(0)
    reduction = ScalarReduction(storage, period=3, first_iter=0)
    waiting = []
    for i in range(1200):
        now_s += 0.3  # a window is of one period
        storage.iter = i
        storage.put_scalars(**{f"s{k}": float(i) for k in range(300)})
        reduction.advance(i)
        reduction.close_if_due(i)
        waiting.append(sum(len(window.sums) for window in reduction._arrived))
    # a rank that writes nothing, as all but the first: a megabyte, and then again
    assert 2**16 < max(waiting) <= 2**17
    assert waiting.count(0) > 2
    reduction.drain(1199)
    assert storage.history("s7").values() == [(float(i), i) for i in range(1200)]

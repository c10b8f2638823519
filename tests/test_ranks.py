"""The many-rank helper itself: results, the failing rank's own error, nobody left over."""

import os
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

pytestmark = pytest.mark.ranks


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def test_results_come_in_the_order_of_the_ranks_from_a_closure() -> None:
    offset = 10

    def sum_over_ranks(rank: int, factor: int, *, power: int) -> tuple[int, float, str]:
        total = torch.tensor([(rank + offset) * factor**power])
        dist.all_reduce(total)
        return rank, total.item(), os.environ["RANK"] + os.environ["LOCAL_WORLD_SIZE"]

    # (10 + 11 + 12) * 2^3
    assert run_ranks(sum_over_ranks, 3, 2, power=3) == [(r, 264, f"{r}3") for r in range(3)]
    assert "RANK" not in os.environ
    assert not children()


def test_the_failing_rank_is_named_although_others_wait_for_it() -> None:
    def fail(rank: int) -> None:
        if rank == 1:
            raise KeyError("lost")
        dist.barrier()

    with pytest.raises(KeyError, match="lost") as caught:
        run_ranks(fail, 3)
    assert "in rank 1" in caught.value.__notes__[0]
    assert 'raise KeyError("lost")' in caught.value.__notes__[0]
    assert not children()


def test_an_exception_that_cannot_be_pickled_arrives_as_text() -> None:
    class Local(Exception):
        pass

    def fail(rank: int) -> None:
        raise Local("of a test")

    with pytest.raises(RuntimeError, match="Local: of a test"):
        run_ranks(fail, 1)


def test_a_rank_that_just_ends_and_one_that_hangs() -> None:
    def vanish(rank: int) -> None:
        if rank == 1:
            os._exit(3)
        dist.barrier()

    def hear_of_its_end_first(rank: int) -> None:
        if rank == 0:  # what gloo says; the sockets of a process close before its pipe does
            raise RuntimeError("Connection reset by peer")
        time.sleep(0.5)
        os._exit(3)

    for fn in (vanish, hear_of_its_end_first):
        with pytest.raises(RuntimeError, match="rank 1 ended without a result, exit code 3"):
            run_ranks(fn, 2)
    with pytest.raises(TimeoutError, match=r"rank\(s\) \[1\] within 1 s"):
        run_ranks(lambda rank: time.sleep(60 * rank), 2, timeout_s=1)
    assert not children()

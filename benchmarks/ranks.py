"""Two gloo ranks on this machine, for what is measured on both of them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from multiprocessing.queues import SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from benchmarks.common import Cost

T = TypeVar("T")


def on_two_ranks(measure: Callable[..., T], *arguments: Any) -> list[T]:
    """Return what `measure(*arguments)` returns on each rank; a few kilobytes at most.

    Raises:
        torch.multiprocessing.ProcessRaisedException: it failed on one of them; both have ended.
    """
    answers: SimpleQueue[tuple[int, T]] = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        about = (f"{folder}/meeting", answers, measure, arguments)
        torch.multiprocessing.spawn(_be_rank, about, nprocs=2)
    by_rank = dict(answers.get() for _ in range(2))
    return [by_rank[rank] for rank in range(2)]


def _be_rank(
    rank: int, meeting: str, answers: Any, measure: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    answers.put((rank, measure(*arguments)))
    dist.barrier()
    dist.destroy_process_group()


def of_both(costs: Iterable[Cost]) -> Cost:
    """Return the cost on both ranks: the CPU time of both, the wall time of the slower."""
    cpu_s, wall_s = zip(*costs, strict=True)
    return Cost(sum(cpu_s), max(wall_s))

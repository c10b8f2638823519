"""Run a function in several ranks of a gloo group, for tests of what ranks do together."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

import torch
import torch._dynamo  # DistributedDataParallel imports these two when it is first made: 2 s,
import torch.distributed as dist
import torch.distributed.tensor.parallel.ddp  # paid here once and not in every rank
from torch._C._distributed_c10d import FileStore

from distrain.errors import add_note

# Fork takes 50 ms a rank where spawn takes 2 s, most of it to import torch again. It needs a parent
# without threads that matter: torch is kept to one thread, and nothing here may touch CUDA.
FORK = multiprocessing.get_context("fork")
PR_SET_PDEATHSIG = 1  # linux/prctl.h
torch.set_num_threads(1)


def _now_s() -> float:
    return time.clock_gettime(time.CLOCK_MONOTONIC)  # whatever TEST_CLOCK does to the others


def run_ranks(
    fn: Callable[..., Any],
    world_size: int = 2,
    *args: Any,
    timeout_s: float = 240,
    **kwargs: Any,
) -> list[Any]:
    """Return what `fn(rank, *args, **kwargs)` returned in each of the ranks, in their order.

    Each rank is a fork of this process with a gloo group of all ranks, one torch thread, and RANK,
    LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE in its environment; `fn` may be a closure. No rank
    is left over, whatever happens.

    Args:
        fn: what a rank does; its result is pickled.
        world_size: how many ranks.
        *args: handed to `fn` after the rank.
        timeout_s: for all of it; then every rank's stacks are written to stderr.
        **kwargs: handed to `fn`.

    Raises:
        Exception: that of the rank that failed first, with a note of its rank and its traceback.
        RuntimeError: a rank ended without a result or not in order, or its exception cannot be
            pickled.
        TimeoutError: a rank had no result in time.
    """
    assert not dist.is_initialized(), "this process is a rank already"
    with tempfile.TemporaryDirectory() as folder:
        pipes = [FORK.Pipe(duplex=False) for _ in range(world_size)]
        call = (fn, args, kwargs, os.path.join(folder, "store"), timeout_s)
        ranks = []
        for rank, (_, write) in enumerate(pipes):
            process = FORK.Process(target=_rank, args=(rank, world_size, pipes, os.getpid(), call))
            process.start()
            ranks.append(process)
            write.close()  # so that a rank that dies is the end of its pipe
        try:
            results = _collect([read for read, _ in pipes], ranks, timeout_s)
            for rank, process in enumerate(ranks):
                if _exit_code(process) != 0:
                    raise RuntimeError(
                        f"rank {rank} gave its result, then its exit code was {process.exitcode}"
                    )
        finally:
            for read, _ in pipes:
                read.close()
            for process in ranks:
                process.kill()
                process.join()
                process.close()
    return results


def _collect(reads: list[Connection], ranks: list[ForkProcess], timeout_s: float) -> list[Any]:
    """Return the results in the ranks' order; raise when a rank fails."""
    deadline = _now_s() + timeout_s
    results: dict[int, Any] = {}
    failures: list[tuple[float, int, Any]] = []
    while len(results) < len(ranks):
        waiting = [rank for rank in range(len(ranks)) if rank not in results]
        ready = wait([reads[rank] for rank in waiting], max(0.0, deadline - _now_s()))
        if not ready and failures:
            break
        if not ready:
            raise TimeoutError(f"no result of rank(s) {waiting} within {timeout_s} s")
        for rank in waiting:
            if reads[rank] in ready:
                at, error, results[rank] = _receive(rank, reads[rank], ranks[rank])
                if error is not None:
                    failures.append((at, rank, error))
        if not all("by peer" in str(error) for _, _, error in failures):
            break
        if failures:
            # the sockets of a rank that dies close before its pipe does: the error of another rank,
            # which lost its connection, may arrive first
            deadline = min(deadline, _now_s() + 10)
    if failures:  # the earliest is the cause, the others may have lost their connection to it
        raise min(failures, key=lambda failure: failure[:2])[2]
    return [results[rank] for rank in range(len(ranks))]


def _receive(rank: int, read: Connection, process: ForkProcess) -> tuple[float, Any, Any]:
    """Return (time, exception or None, result) of a rank that has spoken or ended."""
    try:
        message: tuple[float, Any, Any] = pickle.loads(read.recv_bytes())
    except EOFError:
        error = RuntimeError(f"rank {rank} ended without a result, exit code {_exit_code(process)}")
        return 0.0, error, None
    return message


def _exit_code(process: ForkProcess) -> int | None:
    """Return the exit code of a rank that ends; None if it has not done so after 10 s."""
    if process.exitcode is None:
        # `join(10)` would wait for the processes of its torch loaders too, which take 5 s
        assert process.pid is not None
        file = os.pidfd_open(process.pid)
        wait([file], 10)
        os.close(file)
    return process.exitcode


def _rank(
    rank: int,
    world_size: int,
    pipes: list[tuple[Connection, Connection]],
    parent: int,
    call: tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], str, float],
) -> None:
    """Be one rank; never return into the forked test runner."""
    fn, args, kwargs, store, timeout_s = call
    code = 1
    try:
        die_with(parent)
        for other, (_, write) in enumerate(pipes):
            if other > rank:
                write.close()
        faulthandler.dump_traceback_later(max(0.1, timeout_s - 0.5), file=2)
        for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
            os.environ[name] = os.environ[f"LOCAL_{name}"] = str(value)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        torch.set_num_threads(1)
        code = _work(rank, world_size, pipes[rank][1], lambda: fn(rank, *args, **kwargs), store)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # atexit and pytest's own state belong to the parent


def _work(rank: int, world_size: int, pipe: Connection, work: Callable[[], Any], store: str) -> int:
    """Send (time, exception or None, result) to the parent; return the exit code."""
    try:
        dist.init_process_group(
            "gloo",
            store=FileStore(store, world_size),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=300),
        )
        message = pickle.dumps((0.0, None, work()))
    except BaseException as error:
        pipe.send_bytes(_failure(rank, error))
        return 1
    pipe.send_bytes(message)
    if dist.is_initialized():
        dist.barrier()  # nobody closes a connection that another still reads
        dist.destroy_process_group()
    return 0


def _failure(rank: int, error: BaseException) -> bytes:
    """Return the message that carries an exception, with its traceback as a note."""
    at = _now_s()
    note = f"in rank {rank}:\n{''.join(traceback.format_exception(error))}"
    with contextlib.suppress(Exception):
        add_note(error, note)
        message = pickle.dumps((at, error, None))
        if isinstance(pickle.loads(message)[1], Exception):
            return message
    return pickle.dumps((at, RuntimeError(note), None))


def die_with(parent: int) -> None:
    """End this process when its parent ends, also when that happened just now.

    Args:
        parent: process id of the parent.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)

"""Many ranks in a test: forked from the test's process, which has torch loaded, in 50 ms."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

torch.set_num_threads(1)  # a forked child cannot use a pool of threads that the parent started


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    fn: Callable[..., Any], world_size: int = 2, *args: Any, timeout_s: float = 60.0, **kwargs: Any
) -> list[Any]:
    """Return what `fn(rank, *args, **kwargs)` returns on each rank, in a gloo process group.

    Raises AssertionError with the traceback of the first rank that failed, or that did not end in
    `timeout_s` seconds; no process is left.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(rank, world_size, Path(folder, "store"), writer, os.getpid(), fn, args, kwargs),
            )
            process.start()
            writer.close()
            pipes.append(reader)
            processes.append(process)
        try:
            return _collect(pipes, timeout_s)
        finally:
            for process in processes:
                process.join(timeout=5.0)
                if process.is_alive():
                    process.kill()
                    process.join()


def _collect(pipes: list[Any], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = dict(enumerate(pipes))
    while waiting:
        ready = multiprocessing.connection.wait(list(waiting.values()), timeout=timeout_s)
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting)} did not end within {timeout_s} s")
        for rank, pipe in list(waiting.items()):
            if pipe in ready:
                del waiting[rank]
                try:
                    is_fine, value = pipe.recv()
                except EOFError:
                    raise AssertionError(f"rank {rank} ended without a result") from None
                if not is_fine:
                    raise AssertionError(f"rank {rank} failed:\n{value}")
                results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    rank: int,
    world_size: int,
    store: Path,
    writer: Any,
    parent: int,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # die with the test
    if os.getppid() != parent:
        os._exit(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        OMP_NUM_THREADS="1",
    )
    code = 0
    try:
        dist.init_process_group(
            "gloo", store=dist.FileStore(str(store), world_size), rank=rank, world_size=world_size
        )
        result = fn(rank, *args, **kwargs)
        dist.barrier()
        dist.destroy_process_group()
        writer.send((True, result))
    except BaseException:
        code = 1
        writer.send((False, traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # nothing of pytest may run in the fork

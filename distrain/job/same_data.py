"""Compare the data sets of all ranks at the start: their lengths, and a few samples of each.

A rank takes its part of a data set by position, so ranks whose sets differ, for example in the
order of a listed folder, train on some samples twice and on others never. Samples are loaded in a
child process: the data set and the generators of the rank do not change.

A false alarm is worse than a missed difference. Structure, shapes, dtypes, text and integers are
compared exactly, floats and images, which libraries decode slightly differently, by the means of
their parts with a tolerance, and paths by their last component. Samples that differ between two
loads under one seed, raise, or take too long are left out.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import hashlib
import logging
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from operator import itemgetter
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distrain.data.collate import Fetch, MicroBatch, length_of
from distrain.data.worker_process import WorkerContext, init_worker, signals_held
from distrain.distributed import serialization as wire
from distrain.distributed.collectives import gather_to_all
from distrain.errors import ConfigError
from distrain.log import logger

PROBE_S = 3.0
"""Limit on the time of all samples together; later ones are left out."""

_TOLERANCE = 1e-3  # of means, relative to that of the absolute values
_NUM_MEANS = 8
_TEXT_LENGTH = 60

Print = list[Any]  # digest, means (that of the absolute values first), text


def check_same_data(
    datasets: Mapping[str, Any],
    *,
    seed: int,
    open_before: Mapping[int, str],
    may_fork: bool,
    fix: str = "",
) -> None:
    """Check that all ranks have the same data sets. A collective.

    Args:
        datasets: map-style, by their keys of the configuration.
        seed: of the run, for random numbers of the samples.
        open_before: `open_files()` from before the data sets were built.
        may_fork: whether a child process may load samples; else only lengths are compared.
        fix: another way out, for the error.

    Raises:
        ConfigError: they differ, on all ranks alike; or one is empty or not map-style.
    """
    lengths = {key: length_of(dataset, key) for key, dataset in datasets.items()}
    opened = [fd for fd, link in open_files().items() if open_before.get(fd) != link]
    # a connection, such as to a database, would be in a wrong state after a child has used it
    prints: dict[str, Print] = {}
    if may_fork and all(_is_stateless(fd) for fd in opened):
        with _positions_kept(opened):
            prints = _probe(datasets, seed)
    of_ranks = gather_to_all([lengths, prints])
    for key in datasets:
        _compare_lengths(key, [of_rank[0][key] for of_rank in of_ranks], _FIX + fix)
    for place in sorted({place for of_rank in of_ranks for place in of_rank[1]}):
        _compare_samples(place, [of_rank[1].get(place) for of_rank in of_ranks], _FIX + fix)


def open_files() -> dict[int, str]:
    """Return the targets of this process's open file descriptors, if the system lists them."""
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed
                found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _is_stateless(fd: int) -> bool:
    """Whether use by a child changes nothing of a descriptor but its position."""
    try:
        mode = os.fstat(fd).st_mode
        is_read_only = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    except OSError:  # closed meanwhile
        return True
    return stat.S_ISDIR(mode) or stat.S_ISCHR(mode) or (stat.S_ISREG(mode) and is_read_only)


@contextlib.contextmanager
def _positions_kept(fds: Iterable[int]) -> Iterator[None]:
    """Restore the positions of files, which a child shares, at the end of `with`.

    A buffered reader relies on the position at which it left a file.
    """
    positions = {}
    for fd in fds:
        with contextlib.suppress(OSError):
            positions[fd] = os.lseek(fd, 0, os.SEEK_CUR)
    try:
        yield
    finally:
        for fd, position in positions.items():
            with contextlib.suppress(OSError):
                os.lseek(fd, position, os.SEEK_SET)


def _probe(datasets: Mapping[str, Any], seed: int) -> dict[str, Print]:
    """Return the prints of samples by their places, as many as a child loads in time."""
    context = WorkerContext(rings=())
    receiving, sending = context.Pipe(duplex=False)
    child = context.Process(
        target=_send_prints, args=(sending, receiving, datasets, seed, os.getpid()), daemon=True
    )
    deadline = time.monotonic() + PROBE_S
    prints: dict[str, Print] = {}
    with receiving:
        try:
            with signals_held():
                child.start()
        except OSError as error:  # no memory or no process left: only lengths are compared
            logger.debug("no samples are compared: %s", error)
            sending.close()
            return prints
        sending.close()  # the pipe ends with the child
        with contextlib.suppress(EOFError, OSError):
            while receiving.poll(max(0.0, deadline - time.monotonic())):
                place, found = wire.decode(receiving.recv_bytes())
                prints[place] = found
        child.kill()
        child.join()
    return prints


def _send_prints(
    sending: Connection, receiving: Connection, datasets: Mapping[str, Any], seed: int, parent: int
) -> None:
    """Load samples in the child, and send the prints of those that are the same twice."""
    init_worker(parent)
    receiving.close()
    faulthandler.disable()  # a crash of the child is not one of the rank
    # the data set prints and logs the same in training
    null = sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - to the process's end
    for number in (1, 2):
        os.dup2(null.fileno(), number)
    logging.disable()
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    for key, dataset in datasets.items():
        fetch = Fetch(dataset, seed=seed, collate=itemgetter(0))
        size = len(dataset)
        indices = sorted({0, size // 2, size - 1})
        rounds = [{i: _print_of(fetch, i) for i in indices} for _ in range(2)]
        for index in indices:
            first, second = (prints[index] for prints in rounds)
            if first is not None and first == second:
                sending.send_bytes(wire.encode([f"{key}: sample {index}", first]))


def _print_of(fetch: Fetch, index: int) -> Print | None:
    """Return the print of a sample; None if it cannot be loaded here."""
    at = np.array([index], dtype=np.int64)
    try:
        digest, floats, texts = hashlib.sha256(), list[Any](), list[str]()
        for part in _parts(fetch[MicroBatch(np.zeros_like(at), at)]):
            if isinstance(part, np.ndarray):
                floats.append(part.ravel().astype(np.float64))
                values = " ".join(f"{value:.4g}" for value in part.ravel()[:3])
                texts.append(f"{_kind(part)} {values}" if part.ndim else values)
                part = _kind(part).encode()
            elif not isinstance(part, bytes):
                texts.append(str(part))
            data = part if isinstance(part, bytes) else str(part).encode(errors="replace")
            digest.update(len(data).to_bytes(8, "big") + data)
    except Exception:  # of the user's code; raised again in training
        return None
    text = ", ".join(texts)
    return [digest.hexdigest(), _means(floats), text[:_TEXT_LENGTH]]


def _means(floats: list[Any]) -> list[float]:
    """Return the mean of the absolute values, then the means of _NUM_MEANS parts."""
    if not floats:
        return []
    values = np.nan_to_num(np.concatenate(floats), posinf=0.0, neginf=0.0)
    parts = [abs(values), *np.array_split(values, _NUM_MEANS)]
    return [float(part.mean()) if len(part) else 0.0 for part in parts]


def _parts(value: Any) -> list[Any]:
    """Return the parts of a nested sample in order: arrays, texts (shown in messages), bytes."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            return [f"{value.layout} {_kind(value)}"]
        value = torch.view_as_real(value) if value.is_complex() else value.detach()
        return _parts((value.float() if value.is_floating_point() else value).cpu().numpy())
    if isinstance(value, np.generic | float):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        if value.dtype.kind == "f" or (value.dtype == np.uint8 and value.ndim > 1):
            return [value]
        kind = _kind(value) if value.ndim else _kind(value).encode()
        if value.dtype.kind in "OU":
            return [kind, *(part for each in value.ravel().tolist() for part in _parts(each))]
        if value.dtype.kind not in "biuSmM":
            return [kind]
        return [kind, " ".join(map(str, value.ravel()[:3])), value.tobytes()]
    if isinstance(value, str | PurePath):
        return [os.path.basename(value)]  # nodes may have the files in different folders
    if isinstance(value, bytes | None):
        return [value]
    if isinstance(value, int):
        return [int(value)]
    name = type(value).__name__
    if isinstance(value, Mapping):
        # the text of another object may hold its address
        known = {str(key): each for key, each in value.items() if isinstance(key, str | int)}
        items = sorted(known.items())
        head = f"{name}[{len(value)}] {[key for key, _ in items]}".encode()
        return [head, *(part for _, each in items for part in _parts(each))]
    if isinstance(value, Sequence):
        return [
            f"{name}[{len(value)}]".encode(),
            *(part for each in value for part in _parts(each)),
        ]
    of_image = (getattr(value, name, None) for name in ("size", "mode"))  # as PIL has them
    return [name, *(str(each) for each in of_image if isinstance(each, str | tuple))]


def _kind(array: Any) -> str:
    return f"{str(array.dtype).removeprefix('torch.')}{[*array.shape]}"


def _compare_lengths(key: str, lengths: list[int], fix: str) -> None:
    for rank, length in enumerate(lengths):
        if length != lengths[0]:
            raise ConfigError(
                f"{key}: rank 0 has {lengths[0]} samples, rank {rank} has {length}; {fix}"
            )


def _compare_samples(place: str, prints: list[Print | None], fix: str) -> None:
    known = [(rank, found) for rank, found in enumerate(prints) if found is not None]
    (first, one), *others = known
    for rank, other in others:
        if not _is_same(one, other):
            mine, theirs = one[2], other[2]
            if mine == theirs:  # both are cut
                mine, theirs = (f"{p[2]} ... {p[0][:8]} {p[1][:1]}" for p in (one, other))
            raise ConfigError(
                f"{place} is ({mine}) on rank {first}, ({theirs}) on rank {rank}; {fix}"
            )


_FIX = (
    "expected the same data set on all ranks: sort the result of os.listdir and glob, seed random "
    "numbers in the data set's constructor, and check that all nodes have the same files"
)


def _is_same(one: Print, other: Print) -> bool:
    if one[0] != other[0]:
        return False
    limit = _TOLERANCE * max([0.0, *one[1][:1], *other[1][:1]])
    return all(abs(a - b) <= limit for a, b in zip(one[1], other[1], strict=True))

"""Leases: which run may use which GPU. Standard library only.

A lease is a file per GPU, locked by the command of the run and by each of its ranks: it ends with
the last of them, by `kill -9` too. The lock alone decides; the claim in the file is for people.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distrain.errors import ConfigError, RunFailed
from distrain.gpus import claim as claims
from distrain.gpus.claim import Claim
from distrain.gpus.shared_files import close, folder, is_at, mutex, share, try_lock

_TRIES = 10
_PAUSE_S = 0.1


@dataclass(frozen=True)
class Leases:
    """Leases of this process, until `close`.

    Attributes:
        claim: of the run; `gpus` are those held.
        paths: of the files.
        fds: descriptors that hold the locks.
    """

    claim: Claim
    paths: tuple[str, ...]
    fds: list[int]

    def close(self) -> None:
        """Give the leases up; those of ranks that live go on."""
        for fd in self.fds:
            close(fd)

    def restore(self, patience_s: float) -> None:
        """Lease the GPUs again whose files have been removed: other runs take them to be free.

        Args:
            patience_s: limit of the wait for the mutex.

        Raises:
            ConfigError: another run has taken one meanwhile, or the directory cannot be used.
        """
        for index, path in enumerate(map(Path, self.paths)):
            if is_at(self.fds[index], path):
                continue
            with mutex(folder(), patience_s):
                fd = _lease(path, self.claim)
                if fd is None:
                    other = claims.read(path)
                    raise ConfigError(f"{path}: removed, and leased by {other.text()}")
                close(self.fds[index])
                self.fds[index] = fd


def lease_path(folder: Path, uuid: str) -> Path:
    """Return the file of a GPU; a MIG device of early drivers has slashes in its UUID."""
    return folder / f"gpu-{uuid.replace('/', '_')}"


def holder(folder: Path, uuid: str) -> Claim | None:
    """Return the claim of the run that holds a GPU; None if it is free. Under the mutex.

    Raises:
        OSError: the file cannot be used.
    """
    path = lease_path(folder, uuid)
    if not path.exists():
        return None
    fd = try_lock(path)
    if fd is not None:
        close(fd)
        return None
    return claims.read(path)


def holders(folder: Path, uuids: Iterable[str]) -> dict[str, Claim]:
    """Return the claims of the runs that hold GPUs, by UUID. Under the mutex."""
    found = ((uuid, holder(folder, uuid)) for uuid in uuids)
    return {uuid: claim for uuid, claim in found if claim is not None}


def take(folder: Path, claim: Claim) -> Leases | None:
    """Lease all GPUs of a claim, or none of them: None if one is held. Under the mutex."""
    fds: list[int] = []
    paths = [lease_path(folder, uuid) for uuid in claim.gpus]
    with contextlib.ExitStack() as taken:
        for path in paths:
            fd = _lease(path, claim)
            if fd is None:
                return None
            fds.append(fd)
            taken.callback(close, fd)
        taken.pop_all()
    return Leases(claim, tuple(map(str, paths)), fds)


def _lease(path: Path, claim: Claim) -> int | None:
    """Lock the file of a GPU and write the claim; None if another run holds it."""
    fd = try_lock(path)
    if fd is None:
        return None
    try:
        claims.write(fd, claim)
        share(fd)
    except BaseException:
        close(fd)
        raise
    return fd


def hold(paths: Sequence[str]) -> None:
    """Hold leases of the run until this process ends: called by a rank.

    Raises:
        RunFailed: a lease is not shared with this process.
    """
    for path in paths:
        for _ in range(_TRIES):
            try:
                fd = try_lock(Path(path), fcntl.LOCK_SH)
            except OSError as error:
                raise RunFailed(f"{path}: the lease of a GPU: {error.strerror}") from error
            if fd is not None:
                break
            time.sleep(_PAUSE_S)  # another command may be trying a file that was removed
        else:
            raise RunFailed(f"{path}: another run holds the lease of this GPU")

"""Queue for GPUs: runs wait in the order of their arrival, nice ones behind all others.

A waiting run keeps a file locked that holds its claim, its ticket; an unlocked file is free for the
next one. A run takes no GPU that a run before it wants. Standard library only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from distrain.gpus import claim as claims
from distrain.gpus.claim import Claim
from distrain.gpus.leases import Leases, holders, take
from distrain.gpus.shared_files import MUTEX_HEAD, MUTEX_S, close, is_at, mutex, try_lock

_TICKET = re.compile(r"ticket-(\d{1,9})")


@dataclass(frozen=True)
class Ticket:
    """A place in the queue, until `leave` or the end of the process."""

    claim: Claim
    path: Path
    fd: int

    def write(self) -> None:
        """Write the claim, as one of a run that looks now. Under the mutex."""
        claims.write(self.fd, dataclasses.replace(self.claim, looked_s=time.monotonic()))

    def leave(self) -> None:
        """Leave the queue."""
        os.ftruncate(self.fd, 0)
        close(self.fd)


@dataclass(frozen=True)
class Blocked:
    """A claim that cannot be met now.

    Attributes:
        ahead: claims of the runs that wait for one of its GPUs and are before it.
        behind: likewise, after it.
        holders: claims of the runs that hold its GPUs, by UUID.
        idle: UUIDs of its GPUs that no run holds, no process uses and no run before it wants.
    """

    ahead: list[Claim]
    behind: list[Claim]
    holders: dict[str, Claim]
    idle: list[str]


def enter(folder: Path, claim: Claim, before: Ticket | None = None) -> Ticket:
    """Return a new ticket at the end of the queue.

    Args:
        folder: of the leases.
        claim: of the run.
        before: ticket of the run. It is returned; where its file has been removed, a new one in its
            place.

    Raises:
        ConfigError: the directory cannot be used.
    """
    if before is not None and is_at(before.fd, before.path):
        return before
    with mutex(folder) as counter:
        # the clock keeps the order where the counter has been removed
        clock_ms = int(time.monotonic() * 1000)
        last = max([_count(counter), clock_ms, *(other.number for other in waiting(folder))])
        number = last + 1 if before is None else before.claim.number
        os.pwrite(counter, f"{max(last, number)}\n".encode(), MUTEX_HEAD)
        slot = 0
        while (fd := try_lock(path := folder / f"ticket-{slot}")) is None:
            slot += 1
        ticket = Ticket(dataclasses.replace(claim, number=number), path, fd)
        try:
            ticket.write()
        except BaseException:
            close(fd)
            raise
    if before is not None:
        before.leave()
    return ticket


def waiting(folder: Path, own: Ticket | None = None) -> list[Claim]:
    """Return the claims of the runs that wait, `own` included, in their order. Under the mutex."""
    found = []
    for name in os.listdir(folder):
        path = folder / name
        if own is not None and own.path == path:
            found.append(own.claim)
        elif _TICKET.fullmatch(name):
            fd = try_lock(path)
            if fd is not None:  # its process has ended, or waits no more
                close(fd)
                continue
            found.append(claims.read(path))
    return sorted(found, key=_order)


def announced(folder: Path) -> set[int]:
    """Return the processes that wait, without the mutex; dead ones may be among them."""
    found = set()
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if _TICKET.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    found.add(claims.read(path).pid)
    return found - {0}


def try_claim(
    folder: Path, claim: Claim, uses: Mapping[str, str], ticket: Ticket | None = None
) -> Leases | Blocked:
    """Lease the first idle GPUs of a claim that no run before it wants; it leaves the queue then.

    Args:
        folder: of the leases.
        claim: `count` of its GPUs are leased.
        uses: by whom each GPU is used as NVML reports it, "" if it is idle (see `idle.uses_of`);
            read before the call.
        ticket: of the claim; None: it does not wait, and comes after all that do.

    Raises:
        ConfigError: the directory cannot be used.
    """
    with mutex(folder):
        if ticket is not None:
            ticket.write()
        queue = [each for each in _in_line(folder, ticket) if each.intersects(claim)]
        mine = (claim.nice, float("inf")) if ticket is None else _order(ticket.claim)
        ahead = [each for each in queue if _order(each) < mine]
        held = holders(folder, claim.gpus)
        idle = [uuid for uuid in _left_to(claim, ahead) if uuid not in held and not uses[uuid]]
        if len(idle) >= claim.count:
            chosen = tuple(idle[: claim.count])
            number = 0 if ticket is None else ticket.claim.number
            own = dataclasses.replace(claim, gpus=chosen, since=time.time(), number=number)
            leases = take(folder, own)
            if leases is not None:
                if ticket is not None:
                    ticket.leave()
                return leases
    behind = [each for each in queue if _order(each) > mine]
    return Blocked(ahead, behind, held, idle)


def _order(claim: Claim) -> tuple[bool, float]:
    return claim.nice, claim.number


def _left_to(claim: Claim, ahead: Iterable[Claim]) -> list[str]:
    """Return the GPUs of a claim that no claim before it wants."""
    wanted = {uuid for each in ahead for uuid in each.gpus}
    return [uuid for uuid in claim.gpus if uuid not in wanted]


def _in_line(folder: Path, own: Ticket | None = None) -> list[Claim]:
    """Return `waiting` without silent runs: others pass them, but they keep their place."""
    return [each for each in waiting(folder, own) if not each.is_silent()]


def _count(counter: int) -> int:
    text = os.pread(counter, 30, MUTEX_HEAD).decode(errors="replace").strip()
    return int(text) if text.isdecimal() else 0


def rivals(folder: Path, own: Claim, patience_s: float = MUTEX_S) -> list[Claim]:
    """Return the claims of runs that wait for a GPU of a nice run and are not nice themselves.

    Raises:
        ConfigError: the directory cannot be used.
    """
    with mutex(folder, patience_s):
        return [each for each in _in_line(folder) if not each.nice and each.intersects(own)]


def steps_aside(
    folder: Path, own: Claim, uses: Mapping[str, str], patience_s: float = MUTEX_S
) -> Claim | None:
    """Return the claim for which a nice run gives its GPUs up, so that it can begin; else None.

    Of several nice runs those give up that began last, as many as are needed; none does where the
    other run could not begin nevertheless.

    Args:
        folder: of the leases.
        own: claim of the nice run, with the GPUs that it holds.
        uses: as in `try_claim`, of all GPUs of the machine.
        patience_s: limit of the wait for the mutex.

    Raises:
        ConfigError: the directory cannot be used.
    """
    with mutex(folder, patience_s):
        queue = [each for each in _in_line(folder) if not each.nice]
        for index, claim in enumerate(queue):
            gpus = tuple(_left_to(claim, queue[:index]))
            rival = dataclasses.replace(claim, gpus=gpus)
            if rival.intersects(own):
                held = holders(folder, gpus)
                idle = [u for u in gpus if u not in held and not uses.get(u, "unknown")]
                missing = rival.count - len(idle)
                if _is_needed(own, rival, held.values(), missing):
                    return claim
    return None


def _is_needed(own: Claim, rival: Claim, held: Iterable[Claim], missing: int) -> bool:
    """Return whether `own` is among the nice runs that free `missing` GPUs for `rival`."""
    nice = sorted({each for each in held if each.nice}, key=lambda each: -each.since)
    freed = [len({*each.gpus} & {*rival.gpus}) for each in nice]
    if sum(freed) < missing:
        return False
    for each, num in zip(nice, freed, strict=True):
        if missing <= 0:
            return False
        if each.intersects(own):
            return True
        missing -= num
    return False

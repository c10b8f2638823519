"""GPUs for the ranks of launch=local: idle ones are chosen and leased, or waited for."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from distrain.errors import ConfigError, ExitCode, RunRefused, StoppedBeforeStart
from distrain.gpus import queue
from distrain.gpus.claim import Claim, own_claim
from distrain.gpus.idle import uses_of
from distrain.gpus.leases import Leases, hold
from distrain.gpus.nvml import Gpu, NoDriver, Nvml
from distrain.gpus.queue import Blocked, Ticket
from distrain.gpus.shared_files import folder
from distrain.gpus.visible import VARIABLE, candidates, environment_for, most_ranks
from distrain.launch import Job
from distrain.launch.lease_watch import LeaseWatch
from distrain.launch.stop import StopRequest
from distrain.log import report
from distrain.process.environment import RETURNS, environment
from distrain.text import counted

POLL_S = 1.0
"""Seconds between two looks of a waiting run, and of one that holds leases."""

_TRIES = 3  # of a run that does not wait: the memory of the run before is freed with a delay
_RETRY_S = 0.5

_STOPPED = "stopped while waiting for GPUs; nothing was started"
_NO_GPU = ("", "-1", "NoDevFiles")  # values of the variable for a start on CPUs
_DRIVER = "/dev/nvidiactl"  # where it is, NVML should work


@dataclass(frozen=True)
class GpuRequest:
    """GPUs that a run asks for.

    Attributes:
        ranks: one GPU each; None: all visible ones.
        run_dir: of the run.
        wait: whether it waits for them.
        nice: whether it steps aside for others.
        only_first: whether it can use the first visible GPU alone.
        is_back: whether it has stepped aside, and comes back.
    """

    ranks: int | None
    run_dir: str
    wait: bool = False
    nice: bool = False
    only_first: bool = False
    is_back: bool = False


@dataclass(frozen=True)
class Grant:
    """GPUs that a run has.

    Attributes:
        gpus: one per rank; empty where the ranks run on CPUs.
        leases: of them; None without GPUs.
        variables: with which the ranks see them alone.
    """

    gpus: Sequence[Gpu] = ()
    leases: Leases | None = None
    variables: Mapping[str, str] = field(default_factory=dict)

    def held_by(self, job: Job) -> Job:
        """Return the job, of which each rank holds the leases."""
        return job if self.leases is None else LeasedJob(job, self.leases.paths)

    def names(self) -> str:
        """Return ` on GPUs 0, 2`; "" without GPUs."""
        return f" on {gpu_names(self.gpus)}" if self.gpus else ""


@dataclass(frozen=True)
class LeasedJob:
    """A job whose ranks hold the leases of their run, too: they outlive a killed command."""

    job: Job
    paths: tuple[str, ...]

    @property
    def run_dir(self) -> str:
        """Folder of the run."""
        return self.job.run_dir

    def __call__(self) -> ExitCode:
        """Hold the leases until this process ends, and run the job."""
        hold(self.paths)
        return self.job()


def count_gpus() -> int:
    """Return the number of ranks that the visible GPUs can take, without initialising CUDA."""
    with _machine() as devices:
        return most_ranks(candidates(devices))


def run_leased(
    run: Callable[[Grant], ExitCode], request: GpuRequest, stop: StopRequest
) -> ExitCode:
    """Return `run(grant)`, with the GPUs of the grant leased; run a nice run again when it returns.

    Raises:
        ConfigError: there are not enough GPUs, or not enough idle ones and it does not wait.
        StoppedBeforeStart: a signal came while it waited for its first start.
        RunRefused: the run folder was removed while it waited.
    """
    returns = 0
    while True:
        try:
            with environment({RETURNS: str(returns)} if returns else {}):
                with lease(request, stop) as grant:
                    code = run(grant)
        except StoppedBeforeStart:
            if not returns:
                raise
            report("stopped while it waited for its turn; its state is saved: run it again")
            return ExitCode.STOPPED
        if code != ExitCode.STOPPED or stop.signals or stop.since is None:
            return code
        stop.reset()
        report("stepped aside; this command continues the run when its turn comes")
        ranks = len(grant.gpus)
        request = dataclasses.replace(request, wait=True, ranks=ranks, is_back=True)
        returns += 1


@contextlib.contextmanager
def lease(request: GpuRequest, stop: StopRequest) -> Iterator[Grant]:
    """Lease the GPUs of a run until the end of the `with`; raises as `run_leased`."""
    with _machine(is_logged=True) as devices:
        grant = _granted(devices, request, stop)
    try:
        if grant.leases is not None:
            stop.is_wanted = LeaseWatch(grant.leases, _uses_of_all, POLL_S)
        yield grant
    finally:
        stop.is_wanted = bool
        if grant.leases is not None:
            grant.leases.close()


def _granted(devices: list[list[Gpu]], request: GpuRequest, stop: StopRequest) -> Grant:
    found = candidates(devices)
    if request.only_first:
        found = found[:1]
    if not found and request.is_back:  # it must not continue on CPUs
        raise ConfigError(
            "launch.nice=true: the GPUs have vanished while the run waited; its state is saved: "
            "start it again when nvidia-smi lists them"
        )
    if not found:
        _check_none_is_meant(devices)
        return Grant()
    most = most_ranks(found)
    count = request.ranks or most
    if count > most:
        why = "a process can use one MIG device" if found[0].is_mig else "one per visible GPU"
        raise ConfigError(
            f"launch.ranks={count}: expected at most {most}, {why}; CUDA_VISIBLE_DEVICES= starts "
            "them on CPUs, launch.share=true without a look at the GPUs"
        )
    uuids = [gpu.uuid for gpu in found]
    claim = own_claim(request.run_dir, uuids, count=count, nice=request.nice)
    leases = _acquire(claim, found, request, stop)
    chosen = [gpu for gpu in found if gpu.uuid in leases.claim.gpus]
    return Grant(chosen, leases, environment_for(chosen, devices))


def _check_none_is_meant(devices: Sequence[Sequence[Gpu]]) -> None:
    """Check that no GPU is visible on purpose; a wrong name would train on CPUs.

    Where it is not by the variable, a line is printed.
    """
    if devices and VARIABLE not in os.environ:
        report(
            f"no leases are taken: {counted(len(devices), 'GPU')} here, and none can be used: each "
            "is lost, not permitted, or in MIG mode without a MIG device"
        )
    names = os.environ.get(VARIABLE, "").strip()
    if devices and names not in _NO_GPU:
        known = ", ".join(gpu.label for on_card in devices for gpu in on_card)
        raise ConfigError(
            f"{VARIABLE}={names}: expected some of the GPUs {known}, or their UUIDs, each once; "
            f"{VARIABLE}= starts the ranks on CPUs"
        )


def _acquire(claim: Claim, gpus: Sequence[Gpu], request: GpuRequest, stop: StopRequest) -> Leases:
    ticket: Ticket | None = None
    shown, num_looks, was_quiet = "", 0, stop.is_quiet
    inode = _inode(request.run_dir)
    stop.is_quiet = True  # no rank has a state to save yet
    try:
        while True:
            uses = uses_of(gpus)
            try:
                if request.wait:
                    ticket = queue.enter(folder(), claim, ticket)
                found = queue.try_claim(folder(), claim, uses, ticket)
            except ConfigError as error:
                if ticket is None and not request.is_back:
                    raise
                line = f"waiting for {_idle(claim.count)}; {error}"  # it may pass
            else:
                if isinstance(found, Leases):
                    ticket = None  # it has left the queue
                    if stop.since is not None:  # a signal came during the look
                        found.close()
                        raise StoppedBeforeStart(_STOPPED)
                    return found
                num_looks += 1
                if not request.wait and num_looks == _TRIES:
                    raise _refusal(claim, found, request, _reasons(found, gpus, uses))
                line = _place(claim, found, _reasons(found, gpus, uses))
            if request.wait and line != shown:
                report(line)
                shown = line
            time.sleep(POLL_S if request.wait else _RETRY_S)
            if stop.since is not None:
                raise StoppedBeforeStart(_STOPPED)
            if inode and _inode(request.run_dir) not in (inode, None):
                raise RunRefused(
                    f"run.dir={request.run_dir}: this folder is gone (deleted or moved while the "
                    "run waited for GPUs); nothing was started"
                )
    finally:
        stop.is_quiet = was_quiet
        if ticket is not None:
            ticket.leave()


def _inode(path: str) -> int | None:
    """Return the inode number of a folder; 0 without one, None if it cannot be read now."""
    try:
        return os.stat(path).st_ino
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError:
        return None


def _place(claim: Claim, found: Blocked, reasons: str) -> str:
    """Return the place of a waiting run in the queue, and why it waits."""
    place = len(found.ahead) + 1
    num = place + len(found.behind)
    first = f"; first in the queue: {found.ahead[0].text()}" if found.ahead else ""
    return f"waiting for {_idle(claim.count)}, place {place} of {num} in the queue{reasons}{first}"


def _refusal(claim: Claim, found: Blocked, request: GpuRequest, reasons: str) -> ConfigError:
    key = f"launch.ranks={'null' if request.ranks is None else request.ranks}"
    if request.only_first:
        key = "launch.in_process=true"
    fixes = ["launch.wait=true waits for them"]
    if any(other.nice for other in found.holders.values()) and not claim.nice:
        fixes = ["launch.wait=true waits for them, and nice runs step aside"]
    if found.idle and not found.ahead and not request.only_first:
        fixes.append(f"launch.ranks={len(found.idle)} takes fewer")
    fixes.append("launch.share=true runs alongside them")
    before = ""
    if num := len(found.ahead):
        wait = "waits" if num == 1 else "wait"
        before = f", for which {counted(num, 'run')} {wait}, first: {found.ahead[0].text()}"
    return ConfigError(
        f"{key}: expected {_idle(claim.count)}, found {len(found.idle)} of "
        f"{len(claim.gpus)}{before}{reasons}; {', '.join(fixes)}"
    )


def _idle(count: int) -> str:
    return counted(count, "idle GPU")


def _reasons(found: Blocked, gpus: Sequence[Gpu], uses: Mapping[str, str]) -> str:
    """Return why GPUs cannot be had: `; GPUs 0, 1: held by alice (...); GPU 2: ...`."""
    by_reason: dict[str, list[Gpu]] = {}
    for gpu in gpus:
        held = found.holders.get(gpu.uuid)
        reason = uses[gpu.uuid] if held is None else f"held by {held.text()}"
        if reason:
            by_reason.setdefault(reason, []).append(gpu)
    return "".join(f"; {gpu_names(same)}: {why}" for why, same in by_reason.items())


def gpu_names(gpus: Sequence[Gpu]) -> str:
    """Return `GPUs 0, 2`, numbered as by nvidia-smi."""
    return f"GPU{'s' * (len(gpus) > 1)} {', '.join(gpu.label for gpu in gpus)}"


def _uses_of_all() -> dict[str, str]:
    with _machine() as devices:
        return uses_of([gpu for on_card in devices for gpu in on_card])


@contextlib.contextmanager
def _machine(*, is_logged: bool = False) -> Iterator[list[list[Gpu]]]:
    """Yield the devices of each GPU, with NVML open; none where there is no NVIDIA driver.

    Args:
        is_logged: print a line if there is a driver, but its library fails.
    """
    nvml = None
    try:
        try:
            nvml = Nvml()
            devices = nvml.gpus()
        except NoDriver as error:
            devices = []
            if is_logged and os.path.exists(_DRIVER):
                report(f"no leases are taken: the GPUs cannot be read: {error}")
        yield devices
    finally:
        if nvml is not None:
            nvml.close()

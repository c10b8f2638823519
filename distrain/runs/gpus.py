"""Table of the GPUs of this machine: the runs that hold them and the runs that wait for them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distrain.gpus import queue
from distrain.gpus.claim import Claim
from distrain.gpus.idle import use_of
from distrain.gpus.leases import holders
from distrain.gpus.nvml import Gpu, GpuLost, NoDriver, Nvml
from distrain.gpus.shared_files import folder, mutex
from distrain.process.inspect import command, is_of, owner
from distrain.runs.escape import escaped
from distrain.runs.table import ago, fitted
from distrain.text import table

COLUMNS = ("gpu", "name", "memory", "busy", "state", "user", "process", "since", "run")
_QUEUE_COLUMNS = ("place", "wants", "state", "user", "process", "since", "run")
_FIRST_LEFT_OUT = ("name", "busy", "since", "memory", "process", "wants")
_RIGHT = ("memory", "busy", "place")


@dataclass(frozen=True)
class Device:
    """A GPU or MIG device, and its users.

    Attributes:
        gpu: see `Gpu.label`.
        uuid: of the device.
        name: of the product.
        used_mib: memory in use; None if the driver does not report it.
        total_mib: likewise.
        busy_percent: time in which a kernel ran; None likewise.
        holder: run that holds its lease.
        others: processes on it that are not of the holder: MiB by process id, None if not known.
        use: text on the use of a device that no run holds; "": it is idle.
    """

    gpu: str
    uuid: str
    name: str
    used_mib: float | None
    total_mib: float | None
    busy_percent: float | None
    holder: Claim | None
    others: dict[int, float | None]
    use: str

    @property
    def state(self) -> str:
        """`idle`, `held`, `nice` (held by a run that steps aside) or `in use` without a lease."""
        if self.holder is not None:
            return "nice" if self.holder.nice else "held"
        return "in use" if self.use else "idle"


def show_gpus(*, as_data: bool) -> int:
    """Print the GPUs of this machine and the queue for them; return 0.

    Raises:
        ConfigError: the directory of the leases cannot be used.
    """
    try:
        devices, waiting = look()
    except NoDriver as error:
        print(f"distrain.runs: no NVIDIA driver on this machine: {error}", file=sys.stderr)
        devices, waiting = [], []
    if as_data:
        print(json.dumps(as_json(devices, waiting), indent=1, allow_nan=False))
    elif devices:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        print(as_text(devices, waiting, width, now_s=time.time()))
    return 0


def look() -> tuple[list[Device], list[Claim]]:
    """Return the GPUs of this machine, and the runs that wait, in their order.

    Raises:
        NoDriver: there is no NVIDIA driver, or it does not respond.
        ConfigError: the directory of the leases cannot be used.
    """
    nvml = Nvml()
    try:
        gpus = [gpu for on_card in nvml.gpus() for gpu in on_card]
        path = folder()
        with mutex(path):
            held = holders(path, [gpu.uuid for gpu in gpus])
            waiting = queue.waiting(path)
        return [_device(gpu, held.get(gpu.uuid)) for gpu in gpus], waiting
    finally:
        nvml.close()


def _device(gpu: Gpu, holder: Claim | None) -> Device:
    try:
        used, total = gpu.memory_mib() or (None, None)
        busy, processes = gpu.utilization_percent(), gpu.processes()
    except GpuLost:
        used = total = busy = None
        processes = {}
    others = {
        pid: used_mib
        for pid, used_mib in processes.items()
        if holder is None or not is_of(pid, holder.pid)
    }
    use = "" if holder is not None else use_of(gpu)
    return Device(gpu.label, gpu.uuid, gpu.name, used, total, busy, holder, others, use)


def as_text(
    devices: Sequence[Device], waiting: Sequence[Claim], width: int | None, *, now_s: float
) -> str:
    """Return the table, and that of the queue if a run waits.

    Args:
        devices: of the machine.
        waiting: runs, in their order.
        width: of the terminal; None: all columns are shown.
        now_s: seconds since 1970.
    """
    rows = [row for device in devices for row in _rows(device, now_s)]
    text = _fitted_table(COLUMNS, rows, width)
    if waiting:
        labels = {device.uuid: device.gpu for device in devices}
        queued = [_queue_row(i, claim, labels, now_s) for i, claim in enumerate(waiting, 1)]
        text += f"\n\nwaiting\n{_fitted_table(_QUEUE_COLUMNS, queued, width)}"
    return text


def _rows(device: Device, now_s: float) -> list[list[str]]:
    """Return a row of the device, and one per process on it that is not of the holder."""
    # each process on it has a row of its own, in place of the text
    who = ["", "", "", "" if device.others else device.use]
    if device.holder is not None:
        who = _who(device.holder, now_s)
    others = [
        ["", "", _gib(used_mib), "", "no lease", owner(pid), str(pid), "", command(pid)]
        for pid, used_mib in device.others.items()
    ]
    memory = _gib(device.used_mib, device.total_mib)
    busy = "" if device.busy_percent is None else f"{device.busy_percent:.0f}%"
    return [[device.gpu, device.name, memory, busy, device.state, *who], *others]


def _queue_row(place: int, claim: Claim, labels: dict[str, str], now_s: float) -> list[str]:
    gpus = [labels[uuid] for uuid in claim.gpus if uuid in labels]
    wants = f"{claim.count} of {','.join(gpus)}"
    state = "silent" if claim.is_silent() else "nice" if claim.nice else ""
    return [str(place), wants, state, *_who(claim, now_s)]


def _who(claim: Claim, now_s: float) -> list[str]:
    since = f"{ago(max(0.0, now_s - claim.since))} ago"
    return [claim.user, str(claim.pid), since, claim.run]


def _gib(used_mib: float | None, total_mib: float | None = None) -> str:
    total = "" if total_mib is None else f"/{total_mib / 1024:.0f}"
    return "" if used_mib is None else f"{used_mib / 1024:.0f}{total} GiB"


def _fitted_table(columns: Sequence[str], rows: list[list[str]], width: int | None) -> str:
    cells = [[*columns], *([escaped(cell) for cell in row] for row in rows)]
    kept, left_out = [*range(len(columns))], list[str]()
    if width is not None:
        first = [name for name in _FIRST_LEFT_OUT if name in columns]
        cells, kept, left_out = fitted(
            cells, width, columns=columns, first_left_out=first, cut="run"
        )
    right = [i for i, column in enumerate(kept) if columns[column] in _RIGHT]
    note = f"\nnot shown: {', '.join(left_out)}; see --json" if left_out else ""
    return table(cells, right=right) + note


def as_json(devices: Sequence[Device], waiting: Sequence[Claim]) -> dict[str, Any]:
    """Return all fields of the devices and of the queue."""
    gpus = [dataclasses.asdict(device) | {"state": device.state} for device in devices]
    return {"gpus": gpus, "queue": [dataclasses.asdict(claim) for claim in waiting]}

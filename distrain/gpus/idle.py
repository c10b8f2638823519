"""Whether a GPU is idle, by NVML."""

from __future__ import annotations

import os
from collections.abc import Sequence

from distrain.gpus.nvml import Gpu, GpuLost
from distrain.process.inspect import owner

_IDLE_MIB = 1024  # of the driver, a display, monitoring
_IDLE_FRACTION = 0.02  # of the total memory, if that is more


def use_of(gpu: Gpu) -> str:
    """Return by whom a GPU is used, in words; "" if it is idle.

    Idle is a GPU without a compute process, and with at most 1 GiB or 2 % of its memory in use.
    This process and its memory do not count.
    """
    try:
        processes = gpu.processes()
        memory = gpu.memory_mib()
    except GpuLost:
        return "does not respond"
    own_mib = processes.pop(os.getpid(), 0.0)
    if processes:
        return f"used by {' and '.join(map(_process_text, processes))}"
    if memory is None or own_mib is None:
        return ""
    if memory[0] - own_mib <= max(_IDLE_MIB, _IDLE_FRACTION * memory[1]):
        return ""
    # a process of another container; the amount would change with each look
    return "memory in use by an unknown process"


def uses_of(gpus: Sequence[Gpu]) -> dict[str, str]:
    """Return `use_of` by UUID."""
    return {gpu.uuid: use_of(gpu) for gpu in gpus}


def _process_text(pid: int) -> str:
    """Return `process 12 of alice`, without the user if the process is not seen from here."""
    user = owner(pid)
    return f"process {pid} of {user}" if user else f"process {pid}"

"""GPUs that CUDA_VISIBLE_DEVICES makes visible to a process, without starting CUDA."""

from __future__ import annotations

import os
from collections.abc import Sequence

from distrain.gpus.nvml import Gpu

VARIABLE = "CUDA_VISIBLE_DEVICES"


def candidates(gpus: Sequence[Sequence[Gpu]]) -> list[Gpu]:
    """Return the visible devices of `Nvml.gpus` that the ranks of a run may use, in CUDA's order.

    Those are the whole GPUs; without one, the MIG devices, of which a process can use only one.
    """
    found = visible(gpus, os.environ.get(VARIABLE))
    return [gpu for gpu in found if not gpu.is_mig] or found


def most_ranks(found: Sequence[Gpu]) -> int:
    """Return how many ranks the candidates can take, one per GPU."""
    # CUDA enumerates a single MIG device per process (NVIDIA's MIG user guide, device enumeration)
    return min(1, len(found)) if any(gpu.is_mig for gpu in found) else len(found)


def environment_for(chosen: Sequence[Gpu], gpus: Sequence[Sequence[Gpu]]) -> dict[str, str]:
    """Return the variables with which a process sees the chosen devices alone; {} if it does.

    Args:
        chosen: some of the candidates, in their order.
        gpus: from `Nvml.gpus`.
    """
    names = os.environ.get(VARIABLE)
    # by default CUDA counts the fastest GPU first, NVML in the order of the PCI bus
    by_bus = os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    is_mixed = len({gpu.name for on_card in gpus for gpu in on_card}) > 1
    is_ambiguous = bool(names and names.strip()[:1].isdigit() and is_mixed and not by_bus)
    if [*chosen] == visible(gpus, names) and not is_ambiguous:
        return {}
    return {VARIABLE: ",".join(gpu.uuid for gpu in chosen)}


def visible(gpus: Sequence[Sequence[Gpu]], names: str | None) -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, in its order, as CUDA reads it.

    A name is an index or the beginning of a UUID; the first one that matches no device, or several,
    ends the list. The index of a GPU in MIG mode is its first MIG device. With a device named twice
    no device is visible.

    Args:
        gpus: from `Nvml.gpus`.
        names: value of the variable; None where it is not set: all GPUs are visible.

    Example:
        "1,0" of two GPUs: both, the second first; "" and "-1": none; "GPU-8f,9": GPU-8f... alone.
    """
    devices = [device for devices_of_gpu in gpus for device in devices_of_gpu]
    if names is None:
        return devices
    found: list[Gpu] = []
    for name in names.replace(" ", "").split(","):
        if name.isdecimal():
            matches = [*gpus[int(name)][:1]] if int(name) < len(gpus) else []
        else:
            is_uuid = name.startswith(("GPU-", "MIG-"))
            matches = [gpu for gpu in devices if is_uuid and gpu.uuid.startswith(name)]
        if len(matches) != 1:
            break
        found += matches
    return found if len(set(map(id, found))) == len(found) else []

"""NVML readings of NVIDIA GPUs and MIG devices, without starting CUDA."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pynvml

T = TypeVar("T")

_UNSUPPORTED = {
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,  # of a driver older or newer than the package
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
}
_LOST = {
    pynvml.NVML_ERROR_GPU_IS_LOST,
    pynvml.NVML_ERROR_RESET_REQUIRED,
    pynvml.NVML_ERROR_GPU_NOT_FOUND,
}
_ALL_LINKS = 0xFFFFFFFF  # scopeId of a field value: the sum over all NVLinks
_MAX_EVENTS = 32  # per call: a broken card may send them endlessly


class NoDriver(RuntimeError):
    """NVML cannot be used here, and why."""


class GpuLost(RuntimeError):
    """A GPU no longer responds."""


@dataclass(frozen=True)
class Reading:
    """One reading of one GPU.

    Attributes:
        values: by name, in the unit that the name ends in, without unsupported ones.
        throttle: bits of nvmlClocksEventReason*; None where unsupported.
    """

    values: dict[str, float]
    throttle: int | None = None


@dataclass(eq=False)
class Gpu:
    """A whole GPU, or a MIG device on one.

    Attributes:
        index: of the GPU on this machine, in PCI bus order, as nvidia-smi counts.
        uuid: `GPU-...` or `MIG-...`.
        name: of the product.
        energy_j: since the first `read`; None where neither energy nor power is supported.
    """

    index: int
    uuid: str
    name: str
    handle: Any
    parent: Any  # handle of the GPU that a MIG device is on; else equal to `handle`
    energy_j: float | None = None
    _unsupported: set[Callable[..., Any]] = field(default_factory=set)
    _power: tuple[float, float] | None = None  # time in s, power in W of the last reading
    _first_mj: int | None = None
    _links: tuple[float, int, int] | None = None  # time in s, KiB sent, KiB received

    def read(self, now_s: float) -> Reading:
        """Read the GPU; PCIe traffic alone is measured for 2 x 20 ms.

        For a MIG device temperature, clocks and errors are those of its GPU; power, which other
        devices use too, is left out.

        Args:
            now_s: time on any steady clock.

        Raises:
            GpuLost: it no longer responds.
        """
        values: dict[str, float] = {}
        for reader in _READERS:
            values |= self._try(reader, self) or {}
        self._try(Gpu._count_energy, self, values.get("power_w"), now_s)
        values |= self._try(Gpu._link_traffic, self, now_s) or {}
        return Reading(values, self._try(Gpu._throttle, self))

    @property
    def is_mig(self) -> bool:
        """Whether it is a MIG device."""
        return self.handle is not self.parent

    @property
    def label(self) -> str:
        """Its index; of a MIG device with the beginning of its UUID: `2 MIG-c7384736`."""
        return f"{self.index} {self.uuid[:12]}" if self.is_mig else str(self.index)

    def memory_mib(self) -> tuple[float, float] | None:
        """Return used and total memory in MiB; None where unsupported.

        Raises:
            GpuLost: it no longer responds.
        """
        found = self._ask(_memory)
        return None if found is None else (found["memory_used_mib"], found["memory_total_mib"])

    def utilization_percent(self) -> float | None:
        """Return the fraction of time in which a kernel ran, in percent; None where unsupported.

        Raises:
            GpuLost: it no longer responds.
        """
        found = self._try(_utilization, self)
        return None if found is None else found["utilization_percent"]

    def processes(self) -> dict[int, float | None]:
        """Return the compute processes: MiB in use by process id, None where it is not known.

        In a container the driver may list none, or ids of the host.

        Raises:
            GpuLost: it no longer responds.
        """
        return self._ask(_processes) or {}

    def _ask(self, reader: Callable[[Gpu], T]) -> T | None:
        """Call a reader; None where the value is unsupported.

        Raises:
            GpuLost: any other error: the GPU is not idle for want of a value.
        """
        try:
            return reader(self)
        except pynvml.NVMLError as error:
            if _code(error) in _UNSUPPORTED - {pynvml.NVML_ERROR_INVALID_ARGUMENT}:
                return None
            raise GpuLost(str(error)) from None

    def _try(self, reader: Callable[..., T], *arguments: Any) -> T | None:
        """Call a reader; None on an error, and from then on if the value is unsupported."""
        if reader in self._unsupported:
            return None
        try:
            return reader(*arguments)
        except pynvml.NVMLError as error:
            if _code(error) in _LOST:
                raise GpuLost(str(error)) from None
            if _code(error) in _UNSUPPORTED:
                self._unsupported.add(reader)
        return None

    def _throttle(self) -> int:
        try:
            return int(pynvml.nvmlDeviceGetCurrentClocksEventReasons(self.parent))
        except pynvml.NVMLError as error:
            if _code(error) != pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:
                raise
            return int(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(self.parent))

    def _count_energy(self, power_w: float | None, now_s: float) -> None:
        """Add to the energy: by the card's counter (mJ), else power times time."""
        try:
            total_mj = int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self.handle))
        except pynvml.NVMLError as error:
            if _code(error) not in _UNSUPPORTED:
                raise
        else:
            self._first_mj = total_mj if self._first_mj is None else self._first_mj
            self.energy_j = (total_mj - self._first_mj) / 1000
            return
        if power_w is None:
            return
        before_s, before_w = self._power or (now_s, power_w)
        self.energy_j = (self.energy_j or 0.0) + (now_s - before_s) * (before_w + power_w) / 2
        self._power = (now_s, power_w)

    def _link_traffic(self, now_s: float) -> dict[str, float]:
        """Return the NVLink traffic since the last reading, empty at the first."""
        fields = (
            pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX,
            pynvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX,
        )
        answers = pynvml.nvmlDeviceGetFieldValues(self.handle, [(f, _ALL_LINKS) for f in fields])
        for answer in answers:
            if answer.nvmlReturn != pynvml.NVML_SUCCESS:
                raise pynvml.NVMLError(answer.nvmlReturn)
        sent, received = (int(answer.value.ullVal) for answer in answers)
        before, self._links = self._links, (now_s, sent, received)
        if before is None or now_s <= before[0]:
            return {}
        mb_per_kib_s = 1024 / 1e6 / (now_s - before[0])
        return {
            "nvlink_tx_mb_per_s": (sent - before[1]) * mb_per_kib_s,
            "nvlink_rx_mb_per_s": (received - before[2]) * mb_per_kib_s,
        }


def _utilization(gpu: Gpu) -> dict[str, float]:
    rates = pynvml.nvmlDeviceGetUtilizationRates(gpu.handle)
    return {"utilization_percent": rates.gpu, "memory_busy_percent": rates.memory}


def _memory(gpu: Gpu) -> dict[str, float]:
    memory = pynvml.nvmlDeviceGetMemoryInfo(gpu.handle)
    return {"memory_used_mib": memory.used / 2**20, "memory_total_mib": memory.total / 2**20}


def _processes(gpu: Gpu) -> dict[int, float | None]:
    try:
        found = pynvml.nvmlDeviceGetComputeRunningProcesses_v3(gpu.handle)
    except pynvml.NVMLError as error:
        if _code(error) != pynvml.NVML_ERROR_FUNCTION_NOT_FOUND:
            raise
        found = pynvml.nvmlDeviceGetComputeRunningProcesses_v2(gpu.handle)
    return {p.pid: None if p.usedGpuMemory is None else p.usedGpuMemory / 2**20 for p in found}


def _pcie(gpu: Gpu) -> dict[str, float]:
    sent = pynvml.nvmlDeviceGetPcieThroughput(gpu.handle, pynvml.NVML_PCIE_UTIL_TX_BYTES)
    received = pynvml.nvmlDeviceGetPcieThroughput(gpu.handle, pynvml.NVML_PCIE_UTIL_RX_BYTES)
    return {"pcie_tx_mb_per_s": sent / 1000, "pcie_rx_mb_per_s": received / 1000}  # of KB/s


def _power(gpu: Gpu) -> dict[str, float]:
    return {"power_w": pynvml.nvmlDeviceGetPowerUsage(gpu.handle) / 1000}


def _temperature(gpu: Gpu) -> dict[str, float]:
    sensor = pynvml.NVML_TEMPERATURE_GPU
    return {"temperature_c": pynvml.nvmlDeviceGetTemperature(gpu.parent, sensor)}


def _sm_clock(gpu: Gpu) -> dict[str, float]:
    return {"sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(gpu.parent, pynvml.NVML_CLOCK_SM)}


def _memory_clock(gpu: Gpu) -> dict[str, float]:
    return {"memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(gpu.parent, pynvml.NVML_CLOCK_MEM)}


def _ecc(gpu: Gpu) -> dict[str, float]:
    kind, since_load = pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC
    return {"ecc_uncorrected": pynvml.nvmlDeviceGetTotalEccErrors(gpu.parent, kind, since_load)}


_READERS = (_utilization, _memory, _power, _temperature, _sm_clock, _memory_clock, _ecc, _pcie)


class Nvml:
    """Open connection to the driver, for one thread at a time.

    Raises:
        NoDriver: there is no NVIDIA driver, or it does not respond.
    """

    def __init__(self) -> None:
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NoDriver(str(error)) from None
        self._events: Any = None
        self._by_handle: dict[int, Gpu] = {}

    def close(self) -> None:
        """End the connection."""
        with contextlib.suppress(pynvml.NVMLError):
            if self._events is not None:
                pynvml.nvmlEventSetFree(self._events)
        with contextlib.suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()

    def gpus(self) -> list[list[Gpu]]:
        """Return the CUDA devices of each GPU of this machine: itself, or its MIG devices."""
        try:
            return [_on_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
        except pynvml.NVMLError as error:
            raise NoDriver(str(error)) from None

    def listen(self, gpus: Sequence[Gpu]) -> None:
        """Have the driver keep the Xid errors of GPUs for `xids`, where supported."""
        try:
            self._events = pynvml.nvmlEventSetCreate()
        except pynvml.NVMLError:
            return
        for gpu in gpus:
            handle = _address(gpu.parent)
            if handle not in self._by_handle:
                with contextlib.suppress(pynvml.NVMLError):
                    kind = pynvml.nvmlEventTypeXidCriticalError
                    pynvml.nvmlDeviceRegisterEvents(gpu.parent, kind, self._events)
                    self._by_handle[handle] = gpu

    def xids(self) -> list[tuple[Gpu, int]]:
        """Return the Xid errors since the last call, without waiting."""
        found: list[tuple[Gpu, int]] = []
        if not self._by_handle:
            return found
        for _ in range(_MAX_EVENTS):
            try:
                event = pynvml.nvmlEventSetWait_v2(self._events, 0)
            except pynvml.NVMLError:  # usually a timeout: no event
                break
            gpu = self._by_handle.get(_address(event.device))
            if gpu is not None:
                found.append((gpu, int(event.eventData)))
        return found


def _on_gpu(index: int) -> list[Gpu]:
    """Return the GPU, or its MIG devices where that mode is on; empty if it is lost."""
    try:
        parent = pynvml.nvmlDeviceGetHandleByIndex(index)
        name = pynvml.nvmlDeviceGetName(parent)
        whole = Gpu(index, pynvml.nvmlDeviceGetUUID(parent), name, parent, parent)
    except pynvml.NVMLError:
        return []
    try:
        is_mig = pynvml.nvmlDeviceGetMigMode(parent)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
        num = pynvml.nvmlDeviceGetMaxMigDeviceCount(parent) if is_mig else 0
    except pynvml.NVMLError:
        return [whole]
    if not is_mig:
        return [whole]
    devices = []
    for slot in range(num):
        with contextlib.suppress(pynvml.NVMLError):  # slots may be empty
            handle = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, slot)
            devices.append(Gpu(index, pynvml.nvmlDeviceGetUUID(handle), name, handle, parent))
    return devices


def _code(error: Exception) -> int:
    """Return the NVML_ERROR_... code."""
    return int(getattr(error, "value", pynvml.NVML_ERROR_UNKNOWN))


def _address(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0

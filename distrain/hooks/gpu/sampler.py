"""Sampler: a thread that reads GPUs, and the summary of its readings per window."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from distrain.hooks.gpu.messages import USUAL, throttle_values, throttle_words, xid_words
from distrain.log import logger
from distrain.scalar_names import GPU

if TYPE_CHECKING:
    from distrain.gpus.nvml import Gpu, Nvml, Reading

_MAX = ("memory_used_mib", "temperature_c", "ecc_uncorrected", "xid_errors")
_REPEAT_WARNING_S = 600.0  # minimum time between identical warnings
_JOIN_TIMEOUT_S = 5.0  # a call to the driver of a lost GPU may never return


@dataclass
class Summary:
    """Scalars of a window, by name.

    Attributes:
        means: over the GPUs of this node, by the number of GPUs that have the value.
        maxima: over the GPUs of this node.
        each: of single GPUs.
    """

    means: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    maxima: dict[str, float] = field(default_factory=dict)
    each: dict[str, float] = field(default_factory=dict)


class Sampler(threading.Thread):
    """Reads GPUs periodically, and keeps one summary of all readings since the last `take`.

    Args:
        nvml: open; the caller closes it.
        gpus: by rank.
        host: name of this node.
        period_s: between two readings.
    """

    def __init__(self, nvml: Nvml, gpus: dict[int, Gpu], *, host: str, period_s: float) -> None:
        super().__init__(name="distrain-gpu", daemon=True)
        self.nvml = nvml
        self.host = host
        self._gpus = dict(gpus)
        self._all = list(gpus.values())
        self._rank_of = {gpu.uuid: rank for rank, gpu in gpus.items()}
        self._period_s = period_s
        self._ended = threading.Event()
        self._readings: dict[int, list[Reading]] = defaultdict(list)
        self._summary: Summary | None = None
        self._xids = dict.fromkeys(self._rank_of.values(), 0)
        self._ecc: dict[int, float] = {}
        self._warned_s: dict[tuple[int, str], float] = {}  # time of the last warning
        nvml.listen(self._all)
        self.sample()

    @property
    def energy_j(self) -> float | None:
        """Energy used by all GPUs since this object was made; None where no card supports it."""
        known = [gpu.energy_j for gpu in self._all if gpu.energy_j is not None]
        return sum(known) if known else None

    def run(self) -> None:
        try:
            while not self._ended.wait(self._period_s):
                self.sample()
        except Exception:  # must not end training
            logger.warning("no more telemetry of the GPUs of %s", self.host, exc_info=True)

    def stop(self) -> bool:
        """End the thread; return whether it has ended, which a dead driver may prevent."""
        self._ended.set()
        if self.is_alive():
            self.join(_JOIN_TIMEOUT_S)
        return not self.is_alive()

    def take(self) -> Summary | None:
        """Return the summary of the readings since the last call, None without any."""
        summary, self._summary = self._summary, None
        return summary

    def sample(self) -> None:
        """Read all GPUs once."""
        from distrain.gpus.nvml import GpuLost

        if self._summary is None:
            self._readings.clear()
        for gpu, number in self.nvml.xids():
            rank = self._rank_of[gpu.uuid]
            self._xids[rank] += 1
            self._warn(rank, gpu, xid_words(number))
        for rank, gpu in list(self._gpus.items()):
            try:
                reading = gpu.read(time.monotonic())
            except GpuLost as error:
                del self._gpus[rank]
                self._warn(rank, gpu, f"lost ({error}); training continues while it can")
                continue
            self._readings[rank].append(reading)
            self._check(rank, gpu, reading)
        if any(self._readings.values()):
            self._summary = summarise(self._readings, self._xids)

    def _check(self, rank: int, gpu: Gpu, reading: Reading) -> None:
        """Warn of throttling and new ECC errors."""
        if (reading.throttle or 0) & ~USUAL and (words := throttle_words(reading.throttle or 0)):
            self._warn(rank, gpu, f"throttled by {words}")
        errors = reading.values.get("ecc_uncorrected", 0.0)
        before = self._ecc.setdefault(rank, errors)
        if errors > before:
            self._ecc[rank] = errors
            self._warn(rank, gpu, f"{errors - before:.0f} more uncorrected ECC error(s)")

    def _warn(self, rank: int, gpu: Gpu, text: str) -> None:
        now_s = time.monotonic()
        if now_s < self._warned_s.get((rank, text), float("-inf")) + _REPEAT_WARNING_S:
            return
        self._warned_s[rank, text] = now_s
        logger.warning("GPU %d of %s (%s, rank %d): %s", gpu.index, self.host, gpu.uuid, rank, text)


def summarise(readings: dict[int, list[Reading]], xids: dict[int, int]) -> Summary:
    """Return the means over time of each rank's GPU, and their mean or maximum over GPUs."""
    summary = Summary()
    over_gpus: dict[str, list[float]] = defaultdict(list)
    for rank, readings_of_gpu in readings.items():
        over_time: dict[str, list[float]] = defaultdict(list, xid_errors=[float(xids[rank])])
        for reading in readings_of_gpu:
            throttle = {} if reading.throttle is None else throttle_values(reading.throttle)
            for name, value in {**reading.values, **throttle}.items():
                over_time[name].append(float(value))
        for name, values in over_time.items():
            value = max(values) if name in _MAX else sum(values) / len(values)
            if not name.startswith("throttle_"):
                summary.each[f"{GPU}{rank}/{name}"] = value
            over_gpus[name].append(value)
    for name, values in over_gpus.items():
        if name in _MAX:
            summary.maxima[f"{GPU}{name}"] = max(values)
        else:
            summary.means[len(values)][f"{GPU}{name}"] = sum(values) / len(values)
    return summary

"""What the GPUs do while training runs, from the driver."""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from distrain.distributed import gather_to_all
from distrain.errors import ConfigError
from distrain.hook import HookBase
from distrain.hooks.throughput import samples_per_step
from distrain.log import logger
from distrain.nvml_words import THROTTLE_BITS, USUAL, throttle_words, xid_words
from distrain.trainer import Trainer

if TYPE_CHECKING:
    from distrain.nvml import Gpu, Nvml, Reading

_MAX = ("memory_used_mib", "temperature_c", "ecc_uncorrected", "xid_errors")
_AGAIN_S = 600.0  # what a card keeps saying is told so often
_LEAVE_S = 5.0  # a lost GPU may keep its reader for ever


class GpuStats(HookBase):
    """Puts what NVIDIA's driver says of the GPUs that the ranks use, once a window, under `gpu/`.

    A thread of the first rank of each node reads every `period_s`, beside training; a step pays one
    comparison. What is put are means over the readings since the last window:

    ==================================  ===============================  ========================
    utilization_percent                 a kernel ran                     mean over all GPUs
    memory_busy_percent                 device memory was accessed       mean
    memory_used_mib, memory_total_mib   with other programs              max, mean
    power_w                             of one GPU                       mean
    temperature_c                                                        max
    sm_clock_mhz, memory_clock_mhz                                       mean
    throttled                           share of time held back ...      mean
    throttle_power_cap, _thermal, ...   ... by this                      mean
    ecc_uncorrected                     since the driver was loaded      max of a GPU
    xid_errors                          since the start                  max of a GPU
    pcie_tx_mb_per_s, nvlink_rx_..      10^6 bytes a second of one GPU   mean
    energy_j                            of all GPUs, over resumptions    sum
    energy_per_sample_j                 of all GPUs, since this start    sum
    ==================================  ===============================  ========================

    With up to `each_up_to` ranks, `gpu/RANK/...` holds them for the GPU of each rank (of throttling
    and energy only `throttled`). What a card
    does not know is left out, energy is then power times time, and without a driver there is
    nothing. An Xid or ECC error, a throttled GPU and one that vanishes cost a line of warning in
    the log of the node's first rank, and training goes on.

    Args:
        period_s: between two readings.
        each_up_to: with more ranks than this, values of single GPUs are not put.

    Raises:
        ConfigError: an argument out of its range.
    """

    trainer: Trainer

    def __init__(self, period_s: float = 1.0, each_up_to: int = 16) -> None:
        if period_s <= 0:
            raise ConfigError(f"period_s={period_s}; a number of seconds above 0 is needed")
        if each_up_to < 0:
            raise ConfigError(f"each_up_to={each_up_to}; at least 0 ranks are needed")
        self._period_s = period_s
        self._each_up_to = each_up_to
        self._sampler: Sampler | None = None

    def before_train(self) -> None:
        """Find the GPUs of this node's ranks, and start to read; a collective."""
        trainer = self.trainer
        self.is_idle = True  # until there is something to read
        host = os.uname().nodename
        everyone = gather_to_all((host, trainer.where.local_rank, _uuid(trainer.device)))
        if trainer.where.local_rank != 0:
            return
        history = trainer.storage.histories().get("gpu/energy_j")
        self._energy_before_j = history.latest() if history and trainer.where.is_main else 0.0
        self._samples_per_step = samples_per_step(trainer)
        here = {
            local_rank: (rank, uuid)
            for rank, (name, local_rank, uuid) in enumerate(everyone)
            if name == host
        }
        from distrain.nvml import NoDriver, Nvml  # imports the binding

        try:
            nvml = Nvml()
        except NoDriver as error:
            _say_without(f"{error}")
            return
        try:
            gpus = _of_ranks(nvml, here)
        except NoDriver as error:
            gpus = {}
            _say_without(f"{error}")
        if not gpus:
            _say_without("no GPU is visible")
            nvml.close()
            return
        names = ", ".join(f"rank {rank}: {gpu.name} {gpu.uuid}" for rank, gpu in gpus.items())
        logger.info("reading the GPUs of %s: %s", host, names)
        self._sampler = Sampler(nvml, gpus, host=host, period_s=self._period_s)
        self._sampler.start()
        self.is_idle = False

    def after_step(self) -> None:
        """Put what was read, when a window ends; at the very end after a last reading."""
        assert self._sampler is not None
        done = self.trainer.iter_done
        if done == self.trainer.max_iter:
            if self._sampler.stop():
                self._sampler.sample()
            self._put(self._sampler)
        elif done % self.trainer.window == 0:
            self._put(self._sampler)

    def after_train(self) -> None:
        """End the reading."""
        if self._sampler is None:
            return
        if self._sampler.stop():
            self._sampler.nvml.close()
        else:
            logger.warning("the GPU driver of %s does not answer any more", self._sampler.host)
        self._sampler = None

    def _put(self, sampler: Sampler) -> None:
        storage = self.trainer.storage
        summary = sampler.take()
        if summary is not None:
            for count, values in summary.means.items():
                storage.put_scalars(smoothing_hint=False, reduce="mean", count=count, **values)
            storage.put_scalars(smoothing_hint=False, reduce="max", count=None, **summary.maxima)
            if self.trainer.where.world_size <= self._each_up_to:
                storage.put_scalars(smoothing_hint=False, reduce="mean", count=None, **summary.each)
        energy_j = sampler.energy_j  # put always: a sum over nodes needs all of them
        if energy_j is not None:
            energy = {"gpu/energy_j": self._energy_before_j + energy_j}
            steps = self.trainer.iter_done - self.trainer.start_iter
            if self._samples_per_step is not None:
                energy["gpu/energy_per_sample_j"] = energy_j / (steps * self._samples_per_step)
            storage.put_scalars(smoothing_hint=False, reduce="sum", count=None, **energy)


def _uuid(device: torch.device) -> str | None:
    """Return the UUID of a CUDA device, without the kind before it; None of another device."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def _say_without(why: str) -> None:
    """Say once that there is no telemetry; on a machine for CPUs that is no news."""
    say = logger.info if torch.cuda.is_available() else logger.debug
    say("no telemetry of GPUs under gpu/: %s", why)


def _of_ranks(nvml: Nvml, ranks: dict[int, tuple[int, str | None]]) -> dict[int, Gpu]:
    """Return the GPUs by the rank that uses each.

    Args:
        nvml: open.
        ranks: of this node, by local rank: the rank, and the UUID of its CUDA device. Ranks on
            the CPU take the visible GPUs in their order, as they would with CUDA.
    """
    from distrain.nvml import visible

    gpus = nvml.gpus()
    by_uuid = {gpu.uuid.partition("-")[2]: gpu for devices in gpus for gpu in devices}
    in_order = visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    found: dict[int, Gpu] = {}
    for local_rank, (rank, uuid) in sorted(ranks.items()):
        gpu = by_uuid.get(uuid or "")
        if gpu is None and local_rank < len(in_order):
            gpu = in_order[local_rank]
        if gpu is not None and gpu not in found.values():
            found[rank] = gpu
    return found


@dataclass
class Summary:
    """What is put at the end of a window, by name.

    Attributes:
        means: means over the GPUs of this node, by the number of GPUs that know them.
        maxima: largest values of any GPU.
        each: of single GPUs.
    """

    means: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    maxima: dict[str, float] = field(default_factory=dict)
    each: dict[str, float] = field(default_factory=dict)


class Sampler(threading.Thread):
    """Reads GPUs beside training, and leaves one summary of all it read since the last was taken.

    Args:
        nvml: open; closed by others.
        gpus: by rank.
        host: name of this node.
        period_s: between two readings.

    Attributes:
        energy_j: of all GPUs since this object was made; None where no card tells.
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
        self._told: dict[tuple[int, str], float] = {}
        nvml.listen(self._all)
        self.sample()

    @property
    def energy_j(self) -> float | None:
        """Return the energy that all GPUs have used, in J."""
        known = [gpu.energy_j for gpu in self._all if gpu.energy_j is not None]
        return sum(known) if known else None

    def run(self) -> None:
        """Read until `stop`; what goes wrong here must not end training."""
        try:
            while not self._ended.wait(self._period_s):
                self.sample()
        except Exception:
            logger.warning("no more telemetry of the GPUs of %s", self.host, exc_info=True)

    def stop(self) -> bool:
        """End the thread; return whether it has ended, which a dead driver may prevent."""
        self._ended.set()
        if self.is_alive():
            self.join(_LEAVE_S)
        return not self.is_alive()

    def take(self) -> Summary | None:
        """Return the summary of what was read since the last call, None if nothing was."""
        summary, self._summary = self._summary, None
        return summary

    def sample(self) -> None:
        """Read all GPUs once."""
        from distrain.nvml import GpuLost

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
                self._warn(rank, gpu, f"it is gone ({error}); training goes on while it can")
                continue
            self._readings[rank].append(reading)
            self._look(rank, gpu, reading)
        if any(self._readings.values()):
            self._summary = summarise(self._readings, self._xids)

    def _look(self, rank: int, gpu: Gpu, reading: Reading) -> None:
        """Warn of what is not as it should be."""
        if (reading.throttle or 0) & ~USUAL and (words := throttle_words(reading.throttle or 0)):
            self._warn(rank, gpu, f"its clocks are held back by {words}")
        errors = reading.values.get("ecc_uncorrected", 0.0)
        before = self._ecc.setdefault(rank, errors)
        if errors > before:
            self._ecc[rank] = errors
            self._warn(rank, gpu, f"{errors - before:.0f} uncorrected ECC error(s) more")

    def _warn(self, rank: int, gpu: Gpu, what: str) -> None:
        now_s = time.monotonic()
        if now_s < self._told.get((rank, what), float("-inf")) + _AGAIN_S:
            return
        self._told[rank, what] = now_s
        logger.warning("GPU %d of %s (%s, rank %d): %s", gpu.index, self.host, gpu.uuid, rank, what)


def summarise(readings: dict[int, list[Reading]], xids: dict[int, int]) -> Summary:
    """Return the means over time of each GPU, and their mean or maximum over GPUs.

    Args:
        readings: by rank, oldest first.
        xids: number of Xid errors by rank.
    """
    summary = Summary()
    over_gpus: dict[str, list[float]] = defaultdict(list)
    for rank, of_gpu in readings.items():
        for name, values in _over_time(of_gpu, float(xids[rank])).items():
            value = max(values) if name in _MAX else sum(values) / len(values)
            if not name.startswith("throttle_"):
                summary.each[f"gpu/{rank}/{name}"] = value
            over_gpus[name].append(value)
    for name, values in over_gpus.items():
        if name in _MAX:
            summary.maxima[f"gpu/{name}"] = max(values)
        else:
            summary.means[len(values)][f"gpu/{name}"] = sum(values) / len(values)
    return summary


def _over_time(readings: Sequence[Reading], xids: float) -> dict[str, list[float]]:
    """Return the values of one GPU by name."""
    found: dict[str, list[float]] = defaultdict(list)
    for reading in readings:
        for name, value in reading.values.items():
            found[name].append(float(value))
        if reading.throttle is not None:
            bits = reading.throttle
            found["throttled"].append(float(any(bits & bit for bit in THROTTLE_BITS.values())))
            for name, bit in THROTTLE_BITS.items():
                found[f"throttle_{name}"].append(float(bool(bits & bit)))
    found["xid_errors"].append(xids)
    return found

"""What the GPUs do while training runs, from the driver."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from distrain.distributed.collectives import gather_to_all
from distrain.errors import ConfigError
from distrain.hooks.gpu.sampler import Sampler
from distrain.hooks.throughput import samples_per_step
from distrain.log import logger
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer

if TYPE_CHECKING:
    from distrain.hooks.gpu.nvml import Gpu, Nvml


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
    only_closes = True

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
        from distrain.hooks.gpu.nvml import NoDriver, Nvml  # imports the binding

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
    from distrain.hooks.gpu.nvml import visible

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

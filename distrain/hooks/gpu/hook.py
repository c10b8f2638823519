"""GpuStats: GPU telemetry by NVML during training."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from distrain.checks import number, whole
from distrain.distributed.collectives import gather_to_all
from distrain.hooks.gpu.sampler import Sampler
from distrain.hooks.throughput import samples_per_step
from distrain.log import logger
from distrain.scalar_names import GPU
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer

if TYPE_CHECKING:
    from distrain.gpus.nvml import Gpu, Nvml

_ENERGY_J = f"{GPU}energy_j"


class GpuStats(HookBase):
    """Puts NVML's readings of the GPUs that the ranks use, once per window, under `gpu/`.

    A thread of the first rank of each node reads every `period_s` seconds; a step pays one
    comparison. The scalars are means over the readings since the last window:

    ==================================  ================================  =====================
    name                                quantity                          over GPUs
    ==================================  ================================  =====================
    utilization_percent                 time in which a kernel ran        mean
    memory_busy_percent                 time of device memory accesses    mean
    memory_used_mib, memory_total_mib   of all processes                  max, mean
    power_w                             per GPU                           mean
    temperature_c                                                         max
    sm_clock_mhz, memory_clock_mhz                                        mean
    throttled                           fraction of time                  mean
    throttle_power_cap, _thermal, ...   fraction of time, by reason       mean
    ecc_uncorrected                     since the driver was loaded       max
    xid_errors                          since the start                   max
    pcie_tx_mb_per_s, nvlink_rx_..      10^6 bytes per second and GPU     mean
    energy_j                            over resumptions                  sum
    energy_per_sample_j                 since this start                  sum
    ==================================  ================================  =====================

    With up to `each_up_to` ranks, `gpu/RANK/...` holds them for the GPU of each rank, without
    throttle reasons and energy. Unsupported values are left out; energy is then power times time.
    Without a driver nothing is put. An Xid or ECC error, throttling and a lost GPU are warnings in
    the log of the node's first rank; training continues.

    Args:
        period_s: between two readings.
        each_up_to: largest number of ranks for which values of single GPUs are put.
    """

    trainer: Trainer
    only_closes = True

    def __init__(self, period_s: float = 1.0, each_up_to: int = 16) -> None:
        self._period_s = number("period_s", period_s, above=0)
        self._each_up_to = whole("each_up_to", each_up_to, least=0)
        self._sampler: Sampler | None = None

    def before_train(self) -> None:
        trainer = self.trainer
        self.is_idle = True  # until there is a GPU to read
        host = os.uname().nodename
        ranks = gather_to_all((host, trainer.where.local_rank, _uuid(trainer.device)))
        if trainer.where.local_rank != 0:
            return
        history = trainer.storage.histories().get(_ENERGY_J)
        self._energy_before_j = history.latest() if history and trainer.where.is_main else 0.0
        self._samples_per_step = samples_per_step(trainer)
        ranks_here = {
            local_rank: (rank, uuid)
            for rank, (name, local_rank, uuid) in enumerate(ranks)
            if name == host
        }
        self._sampler = _new_sampler(ranks_here, host, self._period_s)
        if self._sampler is not None:
            self._sampler.start()
            self.is_idle = False

    def after_step(self) -> None:
        assert self._sampler is not None
        done = self.trainer.iter_done
        if done == self.trainer.max_iter:
            if self._sampler.stop():
                self._sampler.sample()
            self._put(self._sampler)
        elif done % self.trainer.window == 0:
            self._put(self._sampler)

    def after_train(self) -> None:
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
            storage.put_scalars(smoothing_hint=False, reduce="max", **summary.maxima)
            if self.trainer.where.world_size <= self._each_up_to:
                storage.put_scalars(smoothing_hint=False, reduce="mean", **summary.each)
        energy_j = sampler.energy_j
        if energy_j is not None:  # put in each window: the sum needs all nodes
            energy = {_ENERGY_J: self._energy_before_j + energy_j}
            steps = self.trainer.iter_done - self.trainer.start_iter
            if self._samples_per_step is not None:
                samples = steps * self._samples_per_step
                energy[f"{GPU}energy_per_sample_j"] = energy_j / samples
            storage.put_scalars(smoothing_hint=False, reduce="sum", **energy)


def _new_sampler(
    ranks: dict[int, tuple[int, str | None]], host: str, period_s: float
) -> Sampler | None:
    """Return a sampler of the GPUs of this node's ranks; None where there is no GPU to read."""
    from distrain.gpus.nvml import NoDriver, Nvml  # imports the binding

    nvml = None
    try:
        nvml = Nvml()
        gpus = _gpus_of_ranks(nvml, ranks)
        if not gpus:
            raise NoDriver("no GPU is visible")
    except NoDriver as error:
        if nvml is not None:
            nvml.close()
        log = logger.info if torch.cuda.is_available() else logger.debug
        log("no telemetry of GPUs under gpu/: %s", error)
        return None
    names = ", ".join(f"rank {rank}: {gpu.name} {gpu.uuid}" for rank, gpu in gpus.items())
    logger.info("reading the GPUs of %s: %s", host, names)
    return Sampler(nvml, gpus, host=host, period_s=period_s)


def _uuid(device: torch.device) -> str | None:
    """Return the UUID of a CUDA device without its prefix; None of another device."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else None


def _gpus_of_ranks(nvml: Nvml, ranks: dict[int, tuple[int, str | None]]) -> dict[int, Gpu]:
    """Return the GPUs by the rank that uses each.

    Args:
        nvml: open.
        ranks: of this node, by local rank: the rank, and the UUID of its CUDA device. Ranks on
            the CPU take the visible GPUs in their order, as they would with CUDA.
    """
    from distrain.gpus.visible import visible

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

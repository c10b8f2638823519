"""Throughput: samples, tokens and FLOPs per second; model FLOPs utilisation."""

from __future__ import annotations

import re
import time

import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from distrain.checks import number, whole
from distrain.log import logger
from distrain.scalar_names import PERF
from distrain.trainer.hook import HookBase
from distrain.trainer.trainer import Trainer

# Dense bf16/fp16 with fp32 accumulation, TFLOP/s, from NVIDIA's data sheets. The first name within
# the card's name counts, so longer names come first.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "A10G": 70.0,
    "A10": 125.0,
    "A30": 165.0,
    "A40": 149.7,
    "A6000": 154.8,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "V100-PCIE": 112.0,
    "V100": 125.0,
    "T4": 65.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_tflops(card: str) -> float | None:
    """Return the peak of a card by its name: `peak_tflops("NVIDIA H100 PCIe")` is 756.0.

    Args:
        card: result of `torch.cuda.get_device_name`; None is returned for a card not in the table.
    """
    if "Laptop" in card:  # named like the desktop's, at half of its speed
        return None
    for name, peak in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", card):
            return peak
    return None


def samples_per_step(trainer: Trainer) -> int | None:
    """Return the number of samples per step over all ranks, None where it is unknown."""
    data = trainer.data
    num = getattr(data, "samples_per_forward", None)
    if isinstance(data, DataLoader):
        num = data.batch_size
    return None if num is None else num * trainer.accumulation * trainer.where.world_size


class Throughput(HookBase):
    """Puts the speed of training over the last window, once per window.

    - `perf/samples_per_s`, over all ranks;
    - `perf/tokens_per_s`, with `tokens_per_sample`;
    - `perf/tflops_per_rank`: 10^12 floating point operations of forward and backward per second;
    - `perf/mfu`: that as a fraction of the card's peak (PaLM, arXiv:2204.02311, appendix B).

    All time counts, evaluation and checkpoints too, but for the first step. Example: 6e12 FLOPs per
    sample, 100 samples per second on 4 ranks: 150 TFLOP/s per rank, on A100s (312) an MFU of 0.48.

    Operations are counted by `torch.utils.flop_counter` in the first step of each rank: matrix
    products, convolutions and attention, including recomputation by activation checkpointing. In a
    step of your own they are those of all its updates, with the products of the optimizers. Not
    counted are custom kernels and compiled models (trainer.compile): give `flops_per_sample`.

    Args:
        tokens_per_sample: such as the length of a sequence.
        flops_per_sample: of forward and backward together; None counts them. A multiplication and
            an addition are two.
        peak_tflops: of one rank's device; None looks the card up in `PEAK_TFLOPS`.
        samples_per_step: over all ranks; None asks the data.
    """

    trainer: Trainer
    only_closes = True

    def __init__(
        self,
        *,
        tokens_per_sample: float | None = None,
        flops_per_sample: float | None = None,
        peak_tflops: float | None = None,
        samples_per_step: int | None = None,
    ) -> None:
        self._tokens = _positive("tokens_per_sample", tokens_per_sample)
        self._flops_per_sample = _positive("flops_per_sample", flops_per_sample)
        self._peak_tflops = _positive("peak_tflops", peak_tflops)
        if samples_per_step is not None:
            whole("samples_per_step", samples_per_step, least=1)
        self._samples = samples_per_step
        self._flops: float | None = None  # per step, of this rank
        self._counter: FlopCounterMode | None = None

    def before_train(self) -> None:
        trainer = self.trainer
        self._since = trainer.start_iter
        self._begin_s = time.perf_counter()
        self._samples = self._samples or samples_per_step(trainer)
        if self._flops_per_sample is not None and self._samples is not None:
            self._flops = self._flops_per_sample * self._samples / trainer.where.world_size
        # under the counter a compiled model runs uncompiled
        is_compiled = trainer.module._compiled_call_impl is not None
        self._counts = self._flops is None and not is_compiled
        if self._flops is None and is_compiled and trainer.where.is_main:
            logger.info("no perf/tflops_per_rank of a compiled model: give flops_per_sample")
        if self._peak_tflops is None and trainer.device.type == "cuda":
            card = torch.cuda.get_device_name(trainer.device)
            self._peak_tflops = peak_tflops(card)
            if self._peak_tflops is None and trainer.where.is_main:
                logger.info("no perf/mfu: set hooks.throughput.peak_tflops for a %s", card)

    def before_step(self) -> None:
        if self.trainer.iter == self.trainer.start_iter and self._counts:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    def after_backward(self) -> None:
        if self.trainer.step is None:  # one of its own may have more updates to come
            self._end_counting()  # the optimizer's update is not counted

    def _end_counting(self) -> None:
        if self._counter is not None:
            counter, self._counter = self._counter, None
            counter.__exit__(None, None, None)
            self._flops = float(counter.get_total_flops()) or None

    def after_step(self) -> None:
        self._end_counting()
        done, trainer = self.trainer.iter_done, self.trainer
        is_first = done == trainer.start_iter + 1
        if done % trainer.window and not is_first:
            return
        now_s = time.perf_counter()
        steps, elapsed_s = done - self._since, now_s - self._begin_s
        self._since, self._begin_s = done, now_s
        if is_first:
            return
        found = {}
        steps_per_s = steps / elapsed_s
        if self._samples is not None:
            found["samples_per_s"] = steps_per_s * self._samples
            if self._tokens is not None:
                found["tokens_per_s"] = steps_per_s * self._samples * self._tokens
        if self._flops is not None:
            found["tflops_per_rank"] = steps_per_s * self._flops / 1e12
            if self._peak_tflops is not None:
                found["mfu"] = found["tflops_per_rank"] / self._peak_tflops
        with trainer.storage.name_scope(PERF):
            trainer.storage.put_scalars(smoothing_hint=False, reduce="mean", **found)

    def after_train(self) -> None:
        self._end_counting()  # where the first step failed


def _positive(key: str, value: float | None) -> float | None:
    return None if value is None else number(key, value, above=0)

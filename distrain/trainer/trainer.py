"""The step of data-parallel training."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from distrain.data.batch import to_channels_last, to_device
from distrain.data.epochs import repeat
from distrain.distributed.comm_hooks import CommHook, compress_gradients
from distrain.distributed.ddp import Replicated, replicate, settle_buckets
from distrain.distributed.fsdp import (
    clip_sharded,
    gather_state,
    gathered_parameters,
    load_model,
    load_optimizer,
    shard,
    without_sync,
)
from distrain.distributed.fsdp_blocks import find_blocks
from distrain.distributed.ranks import local_device
from distrain.events.storage import EventStorage
from distrain.heartbeat import Phase
from distrain.optim.optimizer import clip_gradients, start_momentum
from distrain.scalar_names import GRAD_NORM
from distrain.trainer.hook import HookBase
from distrain.trainer.loop import TrainerBase
from distrain.trainer.model_call import caller, mean_losses, takes_whole_batch, total_loss
from distrain.trainer.module_state import train_mode
from distrain.trainer.nonfinite import SkippedUpdates
from distrain.trainer.numerics import Precision
from distrain.trainer.optimizer_step import clear_gradients, update
from distrain.trainer.options import check_step, check_strategy
from distrain.trainer.thawed import check_still_frozen, frozen_parameters

__all__ = ["Seekable", "Trainer", "TrainerBase"]


@runtime_checkable
class Seekable(Protocol):
    """Data whose stream can start anywhere."""

    def batches(self, start_iter: int) -> Iterator[Any]:
        """Return the endless micro-batches of this rank from an iteration on."""


class Trainer(TrainerBase):
    """Data-parallel training of one model with one optimizer.

    With several ranks the model is wrapped in DistributedDataParallel here; what changes its
    parameters (SyncBatchNorm, the optimizer's groups) comes before.

    Args:
        model: called as `model(batch)` if its forward takes one argument, else as
            `model(*batch)` or `model(**batch)`; returns the loss, a tensor with one element, or
            several by name, whose sum is minimised.
        optimizer: over parameters of the model.
        data: an iterable of this rank's batches, started again when it ends (see `epochs.repeat`);
            or a `TrainLoader`, whose stream starts at any iteration.
        hooks: see `TrainerBase`.
        device: where to train; None is this rank's GPU, or the CPU.
        window: see `TrainerBase`.
        accumulation: A, forwards in one step; the loss is their mean. A named loss that some of
            them do not return is averaged over those that do.
        clip_norm: scale gradients down to this global norm.
        clip_value: clamp gradients to this magnitude.
        precision: "bf16" and "fp16" run forward under autocast, "fp16" with a scaled loss.
        channels_last: keep images and filters in that memory format.
        compile: run the model through torch.compile.
        nonfinite: "stop" ends training when a loss is not finite, or with clip_norm the gradients'
            norm; "skip" leaves the update out, which costs one read-back a step.
        max_skipped: "skip" ends training after so many in a row.
        ddp: further keywords of DistributedDataParallel.
        comm_hook: how gradients travel between ranks, see `compress_gradients`.
        comm_options: of it.
        strategy: "ddp" copies the model to each rank, "fsdp" shards it over them.
        fsdp: further keywords of `strategy.shard`.

    Attributes:
        model: what is called in a step. module: the model itself, unwrapped. Parts of it that are
            in eval mode stay there; if it is as a whole, `train` puts all of it into train mode.
        data_s: seconds that the last step waited for its data.
        grad_norm: () global norm before clipping, on the device; None without clip_norm.

    Raises:
        ConfigError: a keyword has a value that is not allowed; in training: a parameter that was
            frozen requires gradients now, but would not be trained.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: Iterable[Any] | Seekable,
        *,
        hooks: Mapping[str, HookBase] | Iterable[HookBase] = (),
        device: torch.device | None = None,
        window: int = 20,
        accumulation: int = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        precision: Precision = "fp32",
        channels_last: bool = False,
        compile: bool = False,
        nonfinite: Literal["stop", "skip"] = "stop",
        max_skipped: int = 10,
        ddp: Mapping[str, Any] | None = None,
        comm_hook: CommHook = "none",
        comm_options: Mapping[str, Any] | None = None,
        strategy: Literal["ddp", "fsdp"] = "ddp",
        fsdp: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(hooks, window=window, stop_on_nonfinite=nonfinite == "stop")
        clip = {"norm": clip_norm, "value": clip_value}
        check_step(precision, nonfinite, accumulation, clip, ddp or {})
        plain = not (compile or channels_last or precision == "fp16" or comm_hook != "none")
        check_strategy(strategy, plain=plain)
        self.device = device or local_device()
        self.optimizer = optimizer
        self._shard(model, strategy == "fsdp", fsdp or {})
        self.module = model if self.is_sharded else model.to(self.device)
        if channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile:
            self.module.compile()
        world_size = 1 if self.is_sharded else self.where.world_size
        self.model = replicate(self.module, self.device, world_size, ddp or {})
        compress_gradients(self.model, comm_hook, comm_options or {})
        self.data = data
        self.accumulation = accumulation
        self.precision = precision
        self.data_s = 0.0
        self.grad_norm: Tensor | None = None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        self._clip = {key: limit for key, limit in clip.items() if limit is not None}
        self.channels_last = channels_last
        self._takes_whole = takes_whole_batch(self.module)
        self._batch_type: type = type(None)
        self._moves = self.device.type != "cpu"
        self._scales = self.scaler.is_enabled()
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._frozen = frozen_parameters(self.module)
        self._skipped = None
        if nonfinite == "skip":
            self._skipped = SkippedUpdates(
                self.module, self._parameters, max_in_a_row=max_skipped, scaler=self.scaler
            )

    def _shard(self, model: nn.Module, shards: bool, options: Mapping[str, Any]) -> None:
        self.is_sharded = shards and self.where.world_size > 1
        self._reshards = options.get("reshard_after_forward", True)
        if shards:
            find_blocks(model, options.get("blocks"))  # one rank makes the same mistakes
        if self.is_sharded:
            shard(model, self.optimizer, self.device, **options)

    def prepare(self) -> None:
        """Start the stream at `start_iter`; with three ranks or more settle DDP's buckets."""
        train_mode(self.module)
        start_momentum(self.optimizer)
        if isinstance(self.data, Seekable):
            self._batches = self.data.batches(self.start_iter)
        else:
            self._batches = repeat(self.data, start=self.start_iter * self.accumulation)
        if self.where.world_size > 2 and not self.is_sharded and self.start_iter < self.max_iter:
            self._settle_buckets()

    def run_step(self) -> None:
        """Forward, backward, `after_backward`, clipping, update."""
        self.data_s = 0.0
        if self._frozen and (self.iter % self.window == 0 or self.iter + 1 == self.max_iter):
            combined = self.model.combined if isinstance(self.model, Replicated) else None
            check_still_frozen(self._frozen, self.optimizer, combined)
        if self._skipped is not None:
            self._skipped.keep_buffers()
        losses, weights = (
            self._accumulate() if self.accumulation > 1 else (self._forward_backward(), None)
        )
        self.storage.put_losses(losses, weights)
        if self._scales:
            self.scaler.unscale_(self.optimizer)
        self._call("after_backward")
        self.pulse.beat(Phase.OPTIMIZER)
        if self._may_update(losses):
            if self._clip:
                self._clip_gradients()
            if self._scales:
                self.scaler.step(self.optimizer)
            else:
                update(self.optimizer)
        if self._scales:
            self.scaler.update()
        clear_gradients(self.optimizer)

    def _clip_gradients(self) -> None:
        clip = clip_sharded if self.is_sharded else clip_gradients
        self.grad_norm = clip(self._parameters, **self._clip)
        if self.grad_norm is None:
            return
        if self._scales:  # an overflow is no failure: the scaler leaves the update out by itself
            self.storage.put_scalar(GRAD_NORM, self.grad_norm)
        else:
            self.storage.put_losses({GRAD_NORM: self.grad_norm})

    def _may_update(self, losses: Mapping[str, Tensor]) -> bool:
        """Whether the update may be applied: the same on all ranks, as the gradients are."""
        if self._skipped is None:
            return True
        may = self._skipped.may_update(losses, iteration=self.iter)
        self.storage.put_scalar("skipped_update", float(not may), smoothing_hint=False)
        return may

    def _accumulate(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        with without_sync(self.model):
            parts: list[dict[str, Tensor]] = []
            for _ in range(self.accumulation - 1):
                parts.append(self._forward_backward())
                self.pulse.beat(Phase.DATA)
        parts.append(self._forward_backward())
        return mean_losses(parts)

    def _forward_backward(self) -> dict[str, Tensor]:
        begin = time.perf_counter()
        batch = next(self._batches)
        self.data_s += time.perf_counter() - begin
        self.pulse.beat(Phase.FORWARD)
        losses = self.forward(batch)
        loss = losses["loss"]
        if self.accumulation > 1:
            loss = loss / self.accumulation
        if self._skipped is not None:
            loss = self._skipped.spoiling(loss)
        if self._scales:
            loss = self.scaler.scale(loss)
        self.pulse.beat(Phase.BACKWARD)
        loss.backward()
        return losses

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses of a batch by name; "loss" is their sum.

        Args:
            batch: as the data gave it.

        Raises:
            ConfigError: the model returned something else than losses.
        """
        if self._moves:
            batch = to_device(batch, self.device)
        if self.channels_last:
            batch = to_channels_last(batch)
        if batch.__class__ is not self._batch_type:
            self._batch_type = batch.__class__
            self._call_model = caller(self.model, self._batch_type, whole=self._takes_whole)
        if self._autocast is None:
            return total_loss(self._call_model(batch))
        with torch.autocast(self.device.type, self._autocast):
            return total_loss(self._call_model(batch))

    def _settle_buckets(self) -> None:
        """Let DDP put its buckets into their final order before the first step, without a trace.

        DDP rebuilds its buckets once, after the first backward. From three ranks on that changes
        the order of additions, so a resumed run, which has a first backward of its own, would
        differ from a straight one in the last bits.
        """
        assert isinstance(self.model, Replicated)
        settle_buckets(self.model, self._next_loss)

    def _next_loss(self) -> Tensor:
        """Return the loss of the next batch, which stays the next one."""
        batch = next(self._batches)
        self._batches = itertools.chain([batch], self._batches)
        with EventStorage(self.start_iter):
            return self.forward(batch)["loss"]

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which ranks may call the module unequally often. A collective."""
        return gathered_parameters(self.module, reshard_after_forward=self._reshards)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of model, optimizer, scaler, stream, hooks and histories.

        Where the model is sharded this is a collective, and whole on rank 0 only.
        """
        gather = gather_state if self.is_sharded else _same
        return {
            "model": gather(self.module.state_dict()),
            "optimizer": gather(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "stream": {
                "iteration": self.iter_done,
                "samples_per_forward": getattr(self.data, "samples_per_forward", None),
            },
            **super().state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, before `train`.

        Args:
            state: with tensors on the CPU.

        Raises:
            RuntimeError: names or shapes of the model's tensors differ; all are listed.
        """
        if self.is_sharded:
            load_model(self.module, state["model"])
            load_optimizer(self.optimizer, state["optimizer"])
        else:
            self.module.load_state_dict(state["model"])
            load_optimizer(self.optimizer, state["optimizer"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        super().load_state_dict(state)


def _same(state: Any) -> Any:
    return state

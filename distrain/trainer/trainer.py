"""Trainer: the step of data-parallel training."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from typing_extensions import override

from distrain.checks import one_of, whole
from distrain.data.batch import to_channels_last, to_device
from distrain.data.epoch_length import iters_per_epoch
from distrain.data.epochs import EpochLoader
from distrain.data.loader import Loader
from distrain.distributed.ranks import local_device
from distrain.distributed.strategy import Strategy, check_clipping
from distrain.distributed.strategy_by_name import StrategyName, make_strategy
from distrain.distributed.without_profiler import clear_gradients, update
from distrain.events.storage import EventStorage
from distrain.heartbeat import Phase
from distrain.optim.optimizer import start_momentum
from distrain.scalar_names import GRAD_NORM, SKIPPED_UPDATE
from distrain.trainer.frozen_parameters import check_still_frozen, frozen_parameters
from distrain.trainer.hook import HookBase
from distrain.trainer.loop import TrainerBase
from distrain.trainer.loss import WeightedLosses, check_first, unweighted
from distrain.trainer.model_call import caller, mean_losses, takes_whole_batch, total_loss
from distrain.trainer.module_state import train_mode
from distrain.trainer.nonfinite_gradients import SkippedUpdates
from distrain.trainer.numerics import Precision, autocast_dtype
from distrain.trainer.weighted_gradients import EmptyUpdates, WeightedGradients

__all__ = ["Seekable", "Trainer", "TrainerBase"]


@runtime_checkable
class Seekable(Protocol):
    """Data whose stream can start at any iteration."""

    def batches(self, start_iter: int) -> Iterator[Any]:
        """Return the endless micro-batches of this rank from an iteration on."""


class Trainer(TrainerBase):
    """Data-parallel training of one model with one optimizer.

    Args:
        model: called as `model(batch)` if its forward takes one argument, else as
            `model(*batch)` or `model(**batch)`; returns the loss, a tensor with one element or a
            `Loss`, or several by name, whose sum is minimised.
        optimizer: over parameters of the model.
        data: an iterable of this rank's batches, started again when it ends (see `EpochLoader`);
            or a `TrainLoader`, whose stream starts at any iteration.
        hooks: see `TrainerBase`.
        device: of the model; None is this rank's GPU, or the CPU.
        window, max_time: see `TrainerBase`.
        accumulation: A, forwards per step; the loss is their mean. A named loss that some of them
            do not return is averaged over those that do.
        clip_norm: scale gradients down to this global norm.
        clip_value: clamp gradients to this magnitude.
        precision: "bf16" and "fp16" run forward under autocast, "fp16" with a scaled loss.
        channels_last: keep images and filters in that memory format.
        compile: run the model through torch.compile.
        nonfinite: "stop" ends training when a loss is not finite, or with clip_norm the gradients'
            norm; "skip" skips the update, which costs one read-back per step.
        max_skipped: "skip" ends training after more than this many in a row.
        strategy: "ddp" copies the model to each rank, "fsdp" shards it over the ranks; or a
            `Strategy`, such as `DDP(comm_hook="bf16")`.

    Attributes:
        model: called in a step, as the strategy has wrapped it. module: the model itself. Its parts
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
        max_time: str | float | None = None,
        accumulation: int = 1,
        clip_norm: float | None = None,
        clip_value: float | None = None,
        precision: Precision = "fp32",
        channels_last: bool = False,
        compile: bool = False,
        nonfinite: Literal["stop", "skip"] = "stop",
        max_skipped: int = 10,
        strategy: Strategy | StrategyName = "ddp",
    ) -> None:
        stops = nonfinite == "stop"
        super().__init__(hooks, window=window, stop_on_nonfinite=stops, max_time=max_time)
        one_of("trainer.precision", precision, ("fp32", "bf16", "fp16"))
        one_of("trainer.nonfinite", nonfinite, ("stop", "skip"))
        whole("trainer.accumulation", accumulation, least=1)
        check_clipping(clip_norm, clip_value)
        self.strategy = make_strategy(strategy)
        self.strategy.check(
            accumulation=accumulation,
            channels_last=channels_last,
            compile=compile,
            nonfinite=nonfinite,
            precision=precision,
        )
        self.is_sharded = self.strategy.is_sharded
        self.device = device or local_device()
        self.optimizer, self.module = optimizer, model
        if channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile:
            model.compile()
        self.model = self.strategy.wrap(model, optimizer, self.device)
        self.data, self.accumulation, self.precision = data, accumulation, precision
        self._loader = _loader_of(data, accumulation)
        self.data_s, self.channels_last = 0.0, channels_last
        self.grad_norm: Tensor | None = None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self._autocast = autocast_dtype(precision)
        self._clip_norm, self._clip_value = clip_norm, clip_value
        self._takes_whole = takes_whole_batch(model)
        self._batch_type: type = type(None)
        self._moves = self.device.type != "cpu"
        self._scales = self.scaler.is_enabled()
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._frozen = frozen_parameters(model)
        self._skipped = None
        if nonfinite == "skip":
            self._skipped = SkippedUpdates(
                self.strategy, model, self._parameters, scaler=self.scaler, max_in_a_row=max_skipped
            )

    @cached_property
    @override
    def iters_per_epoch(self) -> Fraction | None:
        forwards = self.strategy.data_ranks(self.where).world_size * self.accumulation
        return iters_per_epoch(self.data, forwards=forwards, accumulation=self.accumulation)

    def prepare(self) -> None:
        """Start the stream at `start_iter`, and let the strategy warm up."""
        self._has_run = False  # a forward of training
        self._weighted: WeightedGradients | None = None  # where the model returns a `Loss`
        self._empty_updates = EmptyUpdates()
        train_mode(self.module)
        start_momentum(self.optimizer)
        self._batches = self._loader.batches(self.start_iter)
        if self.start_iter < self.max_iter:
            self.strategy.warm_up(self.model, self._first_loss)

    def run_step(self) -> None:
        """Forward, backward, `after_backward`, clipping, update."""
        self.data_s = 0.0
        if self._frozen and (self.iter % self.window == 0 or self.iter + 1 == self.max_iter):
            reduced = self.strategy.reduced_parameters(self.model)
            check_still_frozen(self._frozen, self.optimizer, reduced)
        if self._skipped is not None:
            self._skipped.keep_buffers()
        losses, weights = (
            self._accumulate() if self.accumulation > 1 else (self._forward_backward(), None)
        )
        is_empty = False
        if self._weighted is not None:
            losses, weights, is_empty = self._weighted.finish()
        self.storage.put_losses(losses, weights)
        if self._scales:
            self.scaler.unscale_(self.optimizer)
        self._call("after_backward")
        self.pulse.beat(Phase.OPTIMIZER)
        if self._may_update(losses, is_empty):
            if self._clip_norm is not None or self._clip_value is not None:
                self._clip_gradients()
            if self._scales:
                self.scaler.step(self.optimizer)
            else:
                update(self.optimizer)
        if self._scales:
            self.scaler.update()
        clear_gradients(self.optimizer)

    def _clip_gradients(self) -> None:
        self.grad_norm = self.strategy.clip(
            self._parameters, norm=self._clip_norm, value=self._clip_value
        )
        if self.grad_norm is None:
            return
        if self._scales:  # an overflow is no failure: the scaler skips the update
            self.storage.put_scalar(GRAD_NORM, self.grad_norm)
        else:
            self.storage.put_losses({GRAD_NORM: self.grad_norm})

    def _may_update(self, losses: Mapping[str, Tensor], is_empty: bool) -> bool:
        """Whether the update may be applied; equal on all ranks, as the gradients are."""
        if self._weighted is not None:
            self._empty_updates.count(is_empty, iteration=self.iter)
        if self._skipped is None and self._weighted is None:
            return True
        may = not is_empty and (
            self._skipped is None or self._skipped.may_update(losses, iteration=self.iter)
        )
        self.storage.put_scalar(SKIPPED_UPDATE, float(not may), smoothing_hint=False)
        return may

    def _accumulate(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        with self.strategy.no_sync(self.model):
            parts: list[dict[str, Tensor]] = []
            for _ in range(self.accumulation - 1):
                parts.append(self._forward_backward(is_last=False))
                self.pulse.beat(Phase.DATA)
        parts.append(self._forward_backward())
        return mean_losses(parts) if self._weighted is None else ({}, {})

    def _forward_backward(self, *, is_last: bool = True) -> dict[str, Tensor]:
        begin = time.perf_counter()
        batch = next(self._batches)
        self.data_s += time.perf_counter() - begin
        self.pulse.beat(Phase.FORWARD)
        losses = self.forward(batch)
        if losses.__class__ is not dict or self._weighted is not None:
            self._weighted_backward(losses, is_last=is_last)
            return losses
        self._has_run = True
        loss = losses["loss"]
        if self.accumulation > 1:
            loss = loss / self.accumulation
        self._backward(loss)
        return losses

    def _backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        if self._skipped is not None:
            loss = self._skipped.propagate_nonfinite(loss)
        if self._scales:
            loss = self.scaler.scale(loss)
        self.pulse.beat(Phase.BACKWARD)
        loss.backward(retain_graph=retain_graph)

    def _weighted_backward(self, losses: dict[str, Tensor], *, is_last: bool) -> None:
        """Backward of losses with weights; which a model returns from its first forward on."""
        if self._weighted is None:
            check_first(losses, has_run=self._has_run)
            self._weighted = WeightedGradients(
                self.strategy, self._parameters, num_forwards=self.accumulation
            )
        weighted = losses if isinstance(losses, WeightedLosses) else unweighted(losses)
        if is_last:
            loss = self._weighted.close(weighted)
            assert loss is not None
            self._backward(loss)
        else:
            with self.strategy.reduced_backward(self.model):
                self._weighted.add(weighted, self._backward)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses of a batch by name; "loss" is their sum.

        Args:
            batch: as the data returned it.

        Raises:
            ConfigError: the model did not return losses.
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

    def _first_loss(self) -> Tensor:
        """Return the loss of the first batch, which the first step gets again."""
        batch = next(self._batches)
        self._batches = itertools.chain([batch], self._batches)
        with EventStorage(self.start_iter):
            return self.forward(batch)["loss"]

    @override
    def data_state(self) -> Any:
        return self._loader.state_dict() if isinstance(self._loader, Loader) else None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of model, optimizer, scaler, stream, hooks and histories.

        Where the model is sharded this is a collective, and complete on rank 0 only.
        """
        return {
            **self.strategy.state_dict(self.module, self.optimizer),
            "scaler": self.scaler.state_dict(),
            "stream": {
                "iteration": self.iter_done,
                "samples_per_forward": getattr(self.data, "samples_per_forward", None),
                # of this rank; a checkpoint has those of all ranks
                **({} if (position := self.data_state()) is None else {"ranks": [position]}),
            },
            **super().state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, before `train`.

        Args:
            state: with tensors on the CPU.

        Raises:
            RuntimeError: names or shapes of the model's tensors differ; all are listed.
        """
        self.strategy.load_state_dict(self.module, self.optimizer, state)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        stream = state["stream"]
        if "ranks" in stream and isinstance(self._loader, Loader):
            self._loader.load_state_dict(
                stream["ranks"], iteration=stream["iteration"], rank=self.where.rank
            )
        super().load_state_dict(state)


def _loader_of(data: Iterable[Any] | Seekable, accumulation: int) -> Seekable:
    return data if isinstance(data, Seekable) else EpochLoader(data, accumulation=accumulation)

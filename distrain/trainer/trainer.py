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

from distrain.checks import one_of, whole, wrong
from distrain.data.batch import to_channels_last, to_device
from distrain.data.epochs import EpochLoader, iters_per_epoch
from distrain.data.loader import Loader
from distrain.distributed.ranks import local_device
from distrain.distributed.strategy import Strategy, check_clipping
from distrain.distributed.strategy_by_name import StrategyName, make_strategy
from distrain.events.storage import EventStorage
from distrain.heartbeat import Phase
from distrain.trainer import optimizers
from distrain.trainer.frozen_parameters import check_still_frozen, frozen_parameters
from distrain.trainer.hook import HookBase
from distrain.trainer.loop import TrainerBase
from distrain.trainer.model_call import caller, mean_losses, takes_whole_batch, total_loss
from distrain.trainer.module_state import train_mode
from distrain.trainer.numerics import Precision, autocast_dtype
from distrain.trainer.step import Step, check_state_methods
from distrain.trainer.updater import Updater

__all__ = ["Seekable", "Trainer", "TrainerBase"]


@runtime_checkable
class Seekable(Protocol):
    """Data whose stream can start at any iteration."""

    def batches(self, start_iter: int) -> Iterator[Any]:
        """Return the endless micro-batches of this rank from an iteration on."""


class Trainer(TrainerBase):
    """Data-parallel training of a model.

    Args:
        model: called as `model(batch)` if its forward takes one argument, else as
            `model(*batch)` or `model(**batch)`; returns the loss, a tensor with one element or a
            `Loss`, or several by name, whose sum is minimised.
        optimizer: over parameters of the model; several by name for a `step`.
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
        step: instead of forward, backward and update; see `Step`.

    Attributes:
        model: called in a step, as the strategy has wrapped it. module: the model itself. Its parts
            in eval mode stay there; if it is as a whole, `train` puts all of it into train mode.
        data_s: seconds that the last step waited for its data.
        grad_norm: () global norm before clipping, on the device; None without clip_norm.
        optimizers: by name; of one alone it is "". optimizer: that one, if there are not several.
        update_name: name of the optimizer whose gradients `after_backward` sees.

    Raises:
        ConfigError: a keyword has a value that is not allowed; in training: a parameter that was
            frozen requires gradients now, but would not be trained.
    """

    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    grad_norm: Tensor | None
    _updater: Updater

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Mapping[str, torch.optim.Optimizer],
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
        step: Step | None = None,
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
        self.module, self.data, self.accumulation = model, data, accumulation
        self.precision, self.channels_last = precision, channels_last
        self.data_s, self.grad_norm, self.update_name = 0.0, None, optimizers.ONLY
        self.step, self.optimizers = step, optimizers.by_name(optimizer)
        self._place_model(compile=compile)
        self.updaters = {
            name: Updater(
                self,
                each,
                name=name,
                clip_norm=clip_norm,
                clip_value=clip_value,
                precision=precision,
                nonfinite=nonfinite,
                max_skipped=max_skipped,
            )
            for name, each in self.optimizers.items()
        }
        if isinstance(optimizer, torch.optim.Optimizer):
            self.optimizer, self._updater = optimizer, self.updaters[optimizers.ONLY]
            self.scaler = self._updater.scaler
        self._autocast = autocast_dtype(precision)

    def _place_model(self, *, compile: bool) -> None:
        """Let the strategy place the model on the device, and prepare to call it with batches."""
        model, optimizers_ = self.module, [*self.optimizers.values()]
        self._loader = _loader_of(self.data, self.accumulation)
        self._takes_whole = takes_whole_batch(model)
        self._batch_type: type = type(None)
        self._moves = self.device.type != "cpu"
        self._frozen = frozen_parameters(model)
        optimizers.check(model, self.optimizers, has_step=self.step is not None)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compile:
            for part in model.values() if isinstance(model, nn.ModuleDict) else [model]:
                part.compile()
        if self.step is None:
            self.model = self.strategy.wrap(model, optimizers_[0], self.device)
            return
        self.step.trainer = self
        check_state_methods(type(self.step))
        if self.accumulation > 1 and not self.step.accumulates:
            kind = type(self.step).__name__
            expected = f"1: {kind} takes one batch; set its accumulates=True, and take a list"
            raise wrong("trainer.accumulation", self.accumulation, expected)
        self.model = self.strategy.wrap_parts(model, optimizers_, self.device)

    @cached_property
    @override
    def iters_per_epoch(self) -> Fraction | None:
        forwards = self.strategy.data_ranks(self.where).world_size * self.accumulation
        return iters_per_epoch(self.data, forwards=forwards, accumulation=self.accumulation)

    def prepare(self) -> None:
        """Start the stream at `start_iter`, and let the strategy warm up."""
        train_mode(self.module)
        for updater in self.updaters.values():
            updater.prepare()
        if self.step is not None:
            self.step.prepare()
        self._batches = self._loader.batches(self.start_iter)
        if self.step is None and self.start_iter < self.max_iter:
            self.strategy.warm_up(self.model, self._first_loss)

    def run_step(self) -> None:
        """Forward, backward, `after_backward`, clipping, update."""
        self.data_s = 0.0
        if self._frozen and (self.iter % self.window == 0 or self.iter + 1 == self.max_iter):
            reduced = self.strategy.reduced_parameters(self.model)
            check_still_frozen(self._frozen, self.optimizers.values(), reduced)
        if self.step is not None:
            self._run_own_step(self.step)
            return
        if self._updater.skipped is not None:
            self._updater.skipped.keep_buffers()
        losses, counts = (
            self._accumulate() if self.accumulation > 1 else (self._forward_backward(), None)
        )
        self._updater.apply(losses, counts)

    def _run_own_step(self, step: Step) -> None:
        """One iteration of the user's step."""
        batches = [self._placed(self._next_batch()) for _ in range(self.accumulation)]
        self.strategy.before_parts(self.module)
        self.pulse.beat(Phase.FORWARD)
        batch = batches if step.accumulates else batches[0]
        if self._autocast is None:
            step(batch)
        else:
            with torch.autocast(self.device.type, self._autocast):
                step(batch)

    def call_after_backward(self) -> None:
        """Call the hooks between backward and update."""
        self._call("after_backward")

    def _accumulate(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        with self.strategy.no_sync(self.model):
            parts: list[dict[str, Tensor]] = []
            for _ in range(self.accumulation - 1):
                parts.append(self._forward_backward(is_last=False))
                self.pulse.beat(Phase.DATA)
        parts.append(self._forward_backward())
        return mean_losses(parts) if self._updater.weighted is None else ({}, {})

    def _forward_backward(self, *, is_last: bool = True) -> dict[str, Tensor]:
        batch = self._next_batch()
        self.pulse.beat(Phase.FORWARD)
        losses = self.forward(batch)
        if self._updater.is_weighted(losses):
            self._updater.weighted_backward(losses, is_last=is_last)
            return losses
        loss = losses["loss"]
        if self.accumulation > 1:
            loss = loss / self.accumulation
        self._updater.backward(loss)
        return losses

    def _next_batch(self) -> Any:
        begin = time.perf_counter()
        batch = next(self._batches)
        self.data_s += time.perf_counter() - begin
        return batch

    def forward(self, batch: Any) -> dict[str, Tensor]:
        """Return the losses of a batch of `data` by name; "loss" is their sum.

        Raises:
            ConfigError: the model did not return losses.
        """
        batch = self._placed(batch)
        if batch.__class__ is not self._batch_type:
            self._batch_type = batch.__class__
            self._call_model = caller(self.model, self._batch_type, whole=self._takes_whole)
        if self._autocast is None:
            return total_loss(self._call_model(batch))
        with torch.autocast(self.device.type, self._autocast):
            return total_loss(self._call_model(batch))

    def _placed(self, batch: Any) -> Any:
        """Return the batch on the device, in the memory format of the model."""
        if self._moves:
            batch = to_device(batch, self.device)
        return to_channels_last(batch) if self.channels_last else batch

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
            **optimizers.state_dict(self.strategy, self.module, self.optimizers),
            **self._step_state(),
            "stream": {
                "iteration": self.iter_done,
                "samples_per_forward": getattr(self.data, "samples_per_forward", None),
                # of this rank; a checkpoint has those of all ranks
                **({} if (position := self.data_state()) is None else {"ranks": [position]}),
            },
            **super().state_dict(),
        }

    def _step_state(self) -> dict[str, Any]:
        scalers = {name: updater.scaler.state_dict() for name, updater in self.updaters.items()}
        state = {"scaler": scalers.get(optimizers.ONLY, scalers)}
        if self.step is not None and (own := self.step.state_dict()):
            state["step"] = own
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned, with tensors on the CPU, before `train`.

        Raises:
            RuntimeError: names or shapes of the model's tensors differ; all are listed.
        """
        optimizers.load_state_dict(self.strategy, self.module, self.optimizers, state)
        for name, updater in self.updaters.items():
            if updater.scaler.is_enabled():
                updater.scaler.load_state_dict(state["scaler"][name] if name else state["scaler"])
        if self.step is not None and state.get("step"):
            self.step.load_state_dict(state["step"])
        stream = state["stream"]
        if "ranks" in stream and isinstance(self._loader, Loader):
            self._loader.load_state_dict(
                stream["ranks"], iteration=stream["iteration"], rank=self.where.rank
            )
        super().load_state_dict(state)


def _loader_of(data: Iterable[Any] | Seekable, accumulation: int) -> Seekable:
    return data if isinstance(data, Seekable) else EpochLoader(data, accumulation=accumulation)

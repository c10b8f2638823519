"""LightningModel: train a LightningModule, or a module with its interface."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from distrain.adapters.lightning_hooks import TrainerView, check_hooks, overrides
from distrain.adapters.lightning_schedules import (
    SCHEDULE_KEYS,
    EveryNth,
    SteppedByModule,
    optimizers_and_schedules,
)
from distrain.checks import did_you_mean, one_of, whole
from distrain.data.batch import batch_length
from distrain.errors import ConfigError
from distrain.events.pending import OPERATIONS, Operation
from distrain.events.storage import get_event_storage
from distrain.trainer.loss import Loss

_MANUAL = (
    "module: {} has automatic_optimization=False: expected "
    "step._target_=distrain.adapters.LightningManualStep; add it"
)


class LightningModel(nn.Module):
    """Trains a module whose `training_step(batch, batch_idx)` returns the loss.

    `self.log` and `self.log_dict` put scalars: `reduce_fx` is the operation over ranks, and
    `batch_size` the weight in the mean. "loss" is skipped: the trainer puts it. `batch_idx` is the
    iteration. Evaluation reports the scalars logged by `validation_step`, or else its loss, as
    `eval/<name>`: the mean over batches, weighted by `batch_size`, or else their size; another
    `reduce_fx` is refused.

    `self.global_step`, `self.current_epoch` and ranks are correct, also in `self.trainer`, which
    has no other attributes. Overridden hooks are called, or refused by name: `lightning_hooks`.

    A module with manual optimization needs the step `LightningManualStep`.

    Args:
        module: the module; also the attribute `module`.
        epoch_iters: iterations per epoch, for `self.current_epoch` and for a schedule with
            `interval: epoch`.

    Raises:
        ConfigError: the module has no `training_step`, or overrides a hook that would not be
            called.
    """

    def __init__(self, module: nn.Module, *, epoch_iters: int | None = None) -> None:
        super().__init__()
        if not callable(getattr(module, "training_step", None)):
            raise ConfigError(f"module: {type(module).__name__} has no training_step(batch, i)")
        check_hooks(module)
        if epoch_iters is not None:
            whole("epoch_iters", epoch_iters, least=1)
        self.module = module
        self.is_manual = getattr(module, "automatic_optimization", True) is False
        self.schedules: list[Any] = []  # of manual optimization
        self.num_updates = 0  # of manual optimization: steps of all optimizers
        self._epoch_iters = epoch_iters
        # scalars logged by a validation step, with their operations and weights
        self._evaluated: dict[str, tuple[Any, Operation, int | None]] | None = None
        self._eval_batches = 0
        self._trainer = TrainerView(epoch_iters)
        self._trained = -1  # iteration of the last training step
        vars(module).update(log=self._log, log_dict=self._log_dict)
        module.trainer = self._trainer  # type: ignore[assignment]
        self._show_progress(0)
        for hook, arguments in (("configure_model", ()), ("setup", ("fit",))):
            if overrides(module, hook):
                getattr(module, hook)(*arguments)

    def forward(self, batch: Any) -> Tensor:
        """Return the loss () of a training step; ConfigError if it returned none."""
        if self.is_manual:
            raise ConfigError(_MANUAL.format(type(self.module).__name__))
        self._trained = get_event_storage().iter
        self._show_progress(self._trained)
        return self._training_loss(batch)

    def manual_step(self, batch: Any) -> None:
        """Call `training_step`, which makes its updates itself."""
        self._trained = get_event_storage().iter
        self._show_progress(self._trained)
        self._call("training_step", batch, self._trained)

    def _training_loss(self, batch: Any) -> Tensor:
        loss = _loss(self._call("training_step", batch, get_event_storage().iter))
        if loss is None:
            raise ConfigError(
                f"module: training_step of {type(self.module).__name__} returned no loss; return a "
                "tensor with one element, or a dict with 'loss'"
            )
        return loss

    def metrics(self, batch: Any) -> dict[str, Tensor | Loss]:
        """Return the scalars of a validation step by name, repeated for each sample: (B,).

        One that was logged with another `batch_size` is a `Loss` with that weight.
        """
        length = batch_length(batch)
        weights: dict[str, int | None] = {}
        self._evaluated = {}
        try:
            if self._trained >= 0:
                self._show_progress(self._trained + 1)
            loss = _loss(self._call("validation_step", batch, self._eval_batches))
            values = {name: _mean(name, *logged[:2]) for name, logged in self._evaluated.items()}
            weights = {name: weight for name, (_, _, weight) in self._evaluated.items()}
            if not values and loss is not None:
                values = {"loss": loss}
            if not values:
                values = {"loss": self._training_loss(batch)}
        finally:
            self._evaluated = None
            self._eval_batches += 1
        return {
            name: _per_sample(
                torch.as_tensor(value).detach().reshape(()), length, weights.get(name)
            )
            for name, value in values.items()
        }

    def check_eval_sets(self, names: Collection[str]) -> None:
        """Raise ConfigError if a validation step depends on which of several sets it is given."""
        step = getattr(self.module, "validation_step", None)
        if len(names) > 1 and step and "dataloader_idx" in inspect.signature(step).parameters:
            raise ConfigError(
                f"data.eval: {', '.join(names)}: validation_step of {type(self.module).__name__} "
                "takes dataloader_idx, which is not passed: expected one set; leave the argument "
                "out, as the names of each set are eval/SET/NAME"
            )

    def predict(self, batch: Any) -> Any:
        """Return the predictions of a `predict_step`; ConfigError if the module has none."""
        if not overrides(self.module, "predict_step"):
            kind = type(self.module).__name__
            raise ConfigError(f"module: {kind} has no predict_step for predictions; write one")
        return self._call("predict_step", batch, self._eval_batches)

    def _call(self, name: str, batch: Any, index: int) -> Any:
        """Call a step of the module, whose argument `batch_idx` is optional, as in Lightning."""
        if overrides(self.module, "on_after_batch_transfer"):
            transfer = cast("Callable[[Any, int], Any]", self.module.on_after_batch_transfer)
            batch = transfer(batch, 0)
        step = cast("Callable[..., Any]", getattr(self.module, name))
        return step(batch, index) if len(inspect.signature(step).parameters) > 1 else step(batch)

    def show_updates(self, num: int) -> None:
        """Set `global_step` with manual optimization: the steps of all optimizers so far."""
        self.num_updates = num
        self._show_progress(self._trainer.iteration)

    def _show_progress(self, iteration: int) -> None:
        """Set `global_step` and `current_epoch`; on the module, too, if it has no properties."""
        self._trainer.iteration = iteration
        self._trainer.global_step = step = self.num_updates if self.is_manual else iteration
        kind = type(self.module)
        if not hasattr(kind, "global_step"):
            vars(self.module)["global_step"] = step
        if self._epoch_iters is not None and not hasattr(kind, "current_epoch"):
            vars(self.module)["current_epoch"] = self._trainer.current_epoch

    def train(self, mode: bool = True) -> LightningModel:
        """Reset the batch count of evaluations; otherwise as `Module.train`."""
        self._eval_batches = 0
        return super().train(mode)

    def configure_optimizers(self) -> tuple[Any, Any]:
        """Return the module's own optimizer and its schedule, which steps once per iteration.

        With manual optimization both are by name, and the module steps the schedules.

        Raises:
            ConfigError: not exactly one optimizer, more than one schedule, or a schedule that
                depends on a metric.
        """
        configure = cast("Callable[[], Any]", self.module.configure_optimizers)
        optimizers, schedules = optimizers_and_schedules(configure())
        is_known = optimizers and all(isinstance(each, Optimizer) for each in optimizers)
        if not is_known or (len(optimizers) > 1 and not self.is_manual):
            kinds = ", ".join(type(each).__name__ for each in optimizers)
            one = "one optimizer; several need automatic_optimization=False"
            expected = "optimizers" if self.is_manual else one
            raise ConfigError(f"configure_optimizers gives {kinds}; expected {expected}")
        if self.is_manual:
            self.schedules = [
                each["scheduler"] if isinstance(each, Mapping) else each for each in schedules
            ]
            named = {f"optimizer_{n}": optimizer for n, optimizer in enumerate(optimizers)}
            return named, {
                name: SteppedByModule(optimizer, self.schedules)
                for name, optimizer in named.items()
            }
        if len(schedules) > 1:
            raise ConfigError(f"configure_optimizers gives {len(schedules)} schedules; give one")
        return optimizers[0], self._per_iteration(schedules[0]) if schedules else None

    def _per_iteration(self, given: Any) -> LRScheduler | EveryNth:
        entry = given if isinstance(given, Mapping) else {"scheduler": given}
        for key in entry.keys() - SCHEDULE_KEYS:
            hint = did_you_mean(str(key), SCHEDULE_KEYS)
            raise ConfigError(f"configure_optimizers: lr_scheduler has no key {key!r}; {hint}")
        schedule, frequency = entry["scheduler"], int(entry.get("frequency", 1))
        waits = isinstance(schedule, ReduceLROnPlateau) or entry.get("reduce_on_plateau")
        if waits or not isinstance(schedule, LRScheduler):
            raise ConfigError(
                f"configure_optimizers: {type(schedule).__name__} waits for a metric; give a "
                "schedule of iterations or epochs"
            )
        key = "configure_optimizers: interval"
        if one_of(key, entry.get("interval", "epoch"), ("step", "epoch")) == "step":
            return schedule if frequency == 1 else EveryNth(schedule, frequency, self._epoch_iters)
        if self._epoch_iters is None:
            raise ConfigError(
                "epoch_iters: expected a value, as configure_optimizers counts epochs: the "
                "size of the data set over data.batch_size; or give interval: step"
            )
        frequency *= self._epoch_iters
        return schedule if frequency == 1 else EveryNth(schedule, frequency)

    def _log(
        self,
        name: str,
        value: Any,
        *flags: Any,
        reduce_fx: Any = "mean",
        batch_size: int | None = None,
        **ignored: Any,
    ) -> None:
        """Replacement of the module's `log`; flags of progress bars and loggers are ignored."""
        operation = _operation(name, reduce_fx)
        _check_number(name, value)
        if self._evaluated is not None:
            self._evaluated[name] = value, operation, batch_size
        elif name != "loss":
            get_event_storage().put_scalar(name, value, reduce=operation, count=batch_size)

    def _log_dict(self, dictionary: Mapping[str, Any], *flags: Any, **keywords: Any) -> None:
        for name, value in dictionary.items():
            self._log(name, value, *flags, **keywords)

    def _apply(self, *args: Any, **keywords: Any) -> LightningModel:
        """Move the module by its own `to` as well, which records the device and dtype."""
        super()._apply(*args, **keywords)  # type: ignore[no-untyped-call]
        first = next(self.module.parameters(), None)
        if first is not None:
            self.module.to(first.device)
        return self


def _loss(output: Any) -> Tensor | None:
    """Return the loss in the output of a step: a tensor, or the item "loss" of a mapping."""
    loss = output.get("loss") if isinstance(output, Mapping) else output
    return loss if isinstance(loss, Tensor) else None


def _check_number(name: str, value: Any) -> None:
    """Raise ConfigError for a value that is not one number, as an object of torchmetrics."""
    if isinstance(value, Tensor):
        got = None if value.numel() == 1 else f"a tensor of shape {[*value.shape]}"
    else:
        got = None if hasattr(value, "__float__") else type(value).__name__
    if got is not None:
        raise ConfigError(
            f"self.log({name!r}): expected one number, not {got}; log the value of the batch, and "
            "name torchmetrics objects in eval.metrics for values over the whole set"
        )


def _mean(name: str, value: Any, operation: Operation) -> Any:
    """Return a value of a validation step; ConfigError if it is not to be averaged."""
    if operation != "mean":
        raise ConfigError(
            f"self.log({name!r}): reduce_fx={operation!r} in validation_step: expected 'mean', as "
            "an evaluation averages over samples; write a function for eval.metrics"
        )
    return value


def _per_sample(value: Tensor, length: int, weight: int | None) -> Tensor | Loss:
    if weight is None or weight == length:
        return value.expand(length)
    return Loss(value.double() * weight, weight)


def _operation(name: str, reduce_fx: Any) -> Operation:
    """Return the operation over ranks for Lightning's `reduce_fx`, a name or torch's function."""
    word = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "")
    if word not in OPERATIONS:
        raise ConfigError(
            f"self.log({name!r}): reduce_fx={reduce_fx!r}; available: {', '.join(OPERATIONS)}"
        )
    return cast("Operation", word)

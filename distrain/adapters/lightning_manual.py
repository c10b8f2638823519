"""LightningManualStep: the step of a LightningModule with manual optimization."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from distrain.adapters.lightning import LightningModel
from distrain.checks import one_of, wrong
from distrain.distributed.ranks import topology
from distrain.distributed.without_profiler import clear_gradients
from distrain.errors import ConfigError
from distrain.trainer.step import Step
from distrain.trainer.updater import Updater


class LightningManualStep(Step):
    """Calls the module's `training_step`, which makes its updates itself.

    `self.optimizers()` are those of `configure_optimizers`, named `optimizer_0`, `optimizer_1` in
    scalars and checkpoints. Their `step()` is an update of distrain: gradients are averaged over
    ranks first, hooks are called, `trainer.clip_norm` and `trainer.nonfinite` apply, and gradients
    are cleared after it. Gradients of an iteration without it are averaged at its end and kept, in
    checkpoints too, for a module that accumulates over iterations. `manual_backward`,
    `clip_gradients`, `toggle_optimizer` and `untoggle_optimizer` work; `lr_schedulers()` are
    stepped by the module.
    """

    @override
    def prepare(self) -> None:
        model, trainer = self.model, self.trainer
        if not isinstance(model, LightningModel) or not model.is_manual:
            kind = type(getattr(model, "module", model)).__name__
            raise ConfigError(
                f"step: LightningManualStep: expected model._target_=distrain.adapters."
                f"LightningModel of a module with automatic_optimization=False, not {kind}"
            )
        if trainer.precision == "fp16":
            expected = "bf16 or fp32 with manual optimization, whose loss belongs to no optimizer"
            raise wrong("trainer.precision", "fp16", expected)
        if "" in trainer.optimizers:
            raise ConfigError("optim: expected null with manual optimization")
        if trainer.is_sharded:
            raise wrong("trainer.strategy", "fsdp", "ddp with manual optimization")
        self._losses: dict[str, Tensor] = {}
        self._toggled: list[Tensor] = []
        self._reduced: set[str] = set()  # names of optimizers whose gradients are averaged
        self._updated: set[str] = set()  # names of optimizers that updated in this iteration
        self._optimizers = [_Optimizer(self, each) for each in trainer.updaters.values()]
        vars(model.module).update(
            optimizers=lambda use_pl_optimizer=True: _alone(self._optimizers),
            lr_schedulers=lambda: _alone(model.schedules) if model.schedules else None,
            manual_backward=self._backward,
            clip_gradients=self._clip,
            toggle_optimizer=self._toggle,
            untoggle_optimizer=self._untoggle,
        )

    @override
    def __call__(self, batch: Any) -> None:
        for updater in self.trainer.updaters.values():
            if updater.skipped is not None:
                updater.skipped.keep_buffers()
        self._updated.clear()
        self.model.manual_step(batch)
        self._losses.clear()
        for updater in self.trainer.updaters.values():
            # kept for a later update: equal on all ranks, as a checkpoint has those of rank 0
            if updater.name not in self._reduced and self._has_gradients(updater):
                self.reduce(updater)

    @override
    def state_dict(self) -> dict[str, Any]:
        gradients = {
            name: parameter.grad
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        return {"num_updates": self.model.num_updates, "gradients": gradients}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.show_updates(state["num_updates"])
        for name, parameter in self.model.named_parameters():
            found = state["gradients"].get(name)
            parameter.grad = None if found is None else torch.empty_like(parameter).copy_(found)

    def _has_gradients(self, updater: Updater) -> bool:
        found = any(parameter.grad is not None for parameter in updater.parameters)
        # Without an update ranks may differ, where a loss depends on the batch. After one only
        # another optimizer's backward leaves gradients, which costs no collective.
        if updater.name in self._updated or topology().world_size == 1:
            return found
        flag = torch.tensor(float(found), device=self.trainer.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def _backward(self, loss: Tensor, *args: Any, **keywords: Any) -> None:
        skipped = next(iter(self.trainer.updaters.values())).skipped
        self._losses["loss"] = self._losses.get("loss", 0) + loss.detach()
        self._reduced.clear()
        with torch.autocast(self.trainer.device.type, enabled=False):
            if skipped is not None:
                loss = skipped.propagate_nonfinite(loss)
            loss.backward(*args, **keywords)

    def reduce(self, updater: Updater) -> None:
        """Average the gradients of an optimizer over ranks, if there was a backward since."""
        if updater.name not in self._reduced:
            self.trainer.strategy.reduce_gradients(updater.parameters)
            self._reduced.add(updater.name)

    def apply(self, updater: Updater) -> None:
        """Update by one optimizer."""
        trainer, losses = self.trainer, self._losses
        self.reduce(updater)
        self._losses = {}
        self._updated.add(updater.name)
        trainer.update_name = updater.name
        with (
            torch.autocast(trainer.device.type, enabled=False),
            trainer.storage.name_scope(updater.name),
        ):
            updater.apply(losses, None)
        self.model.show_updates(self.model.num_updates + 1)
        torch.clear_autocast_cache()

    def _clip(
        self,
        optimizer: _Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val is None:
            return
        kind = one_of("gradient_clip_algorithm", gradient_clip_algorithm or "norm", _CLIPS)
        self.reduce(optimizer.updater)
        limits = {kind: float(gradient_clip_val)}
        self.trainer.strategy.clip(optimizer.updater.parameters, **limits)

    def _toggle(self, optimizer: _Optimizer) -> None:
        self._toggled = optimizer.updater.trainable_of_others()
        self._require_gradients(False)

    def _untoggle(self, optimizer: _Optimizer) -> None:
        self._require_gradients(True)
        self._toggled = []

    def _require_gradients(self, require: bool) -> None:
        for parameter in self._toggled:
            parameter.requires_grad_(require)
        torch.clear_autocast_cache()


_CLIPS = ("norm", "value")


class _Optimizer:
    """An optimizer as `self.optimizers()` of a LightningModule returns it."""

    def __init__(self, step: LightningManualStep, updater: Updater) -> None:
        self.updater, self._step = updater, step
        self.optimizer = updater.optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def zero_grad(self, *args: Any, **keywords: Any) -> None:
        """Clear the gradients."""
        clear_gradients(self.optimizer)

    def step(self, closure: Callable[[], Any] | None = None, **_: Any) -> None:
        """Call the closure, if there is one, and update."""
        if closure is not None:
            closure()
        self._step.apply(self.updater)

    @contextlib.contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Any:
        """Let other parameters require no gradient; gradients are averaged in `step` anyway."""
        self._step._toggle(self)
        try:
            yield
        finally:
            self._step._untoggle(self)


def _alone(items: list[Any]) -> Any:
    return items[0] if len(items) == 1 else items

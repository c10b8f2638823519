"""Step: the step of training written by the user, with one or several updates."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from distrain.checks import did_you_mean, wrong
from distrain.distributed.without_profiler import clear_gradients
from distrain.errors import ConfigError
from distrain.trainer.loss import Loss
from distrain.trainer.model_call import total_loss
from distrain.trainer.updater import Updater

if TYPE_CHECKING:
    from distrain.trainer.trainer import Trainer


class Step(ABC):
    """One iteration: losses, backwards and updates in any order.

    The default step of `Trainer` is a forward, the sum of the losses, a backward and an update. A
    step of your own calls the parts of the model as it likes::

        class WGANStep(distrain.Step):
            def __call__(self, batch):
                with self.update("critic") as update:
                    update.backward(critic_loss)
                if self.iter % 5 == 0:
                    with self.update("generator") as update:
                        update.backward(generator_loss)

    It runs under the trainer's autocast, on every rank with its part of the batch. All ranks must
    make the same updates in the same order. Gradients are averaged over ranks at the end of each
    update, whatever was called and however often; they are those of the parts themselves, which
    DistributedDataParallel does not wrap.

    Attributes:
        trainer: set by the trainer.
        accumulates: whether the step takes a list of `trainer.accumulation` batches instead of one;
            each loss then counts 1 / accumulation.
    """

    trainer: Trainer
    accumulates: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, batch: Any) -> None:
        """Do one iteration.

        Args:
            batch: on the device; a list of them if `accumulates`.
        """

    def prepare(self) -> None:  # noqa: B027
        """Prepare for training, or check the trainer; called before the first step."""

    @property
    def iter(self) -> int:
        """The current iteration."""
        return self.trainer.iter

    @property
    def model(self) -> Any:
        """The model; of several by name a `torch.nn.ModuleDict`."""
        return self.trainer.model

    def update(self, name: str = "") -> Update:
        """Return the context of one update.

        Args:
            name: of the optimizer, where there are several; ConfigError for an unknown one.
        """
        updaters = self.trainer.updaters
        if name not in updaters:
            known = ", ".join(updaters) or "none"
            hint = did_you_mean(name, updaters) if "" not in updaters else "leave the name out"
            raise wrong("step: update", repr(name), f"the name of an optimizer, {known} ({hint})")
        return Update(self.trainer, updaters[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the step for a resumed run."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Load what `state_dict` returned; both are overridden, or none."""


def check_state_methods(kind: type[Step]) -> None:
    """Raise ConfigError for a class with only one state method: a resumed run lacks the state."""
    saves = kind.state_dict is not Step.state_dict
    if saves != (kind.load_state_dict is not Step.load_state_dict):
        found, missing = ("state_dict", "load_state_dict")[:: 1 if saves else -1]
        raise ConfigError(f"step: {kind.__name__} has {found}: expected {missing} too")


class Update:
    """Context of one update of one optimizer.

    At its end: gradients averaged over ranks, `after_backward` of the hooks, clipping, the update,
    gradients cleared. Inside it the parameters of other optimizers require no gradient. Its losses
    and its `grad_norm` are put as those of the default step, under the name of the optimizer where
    there are several: `critic/loss`. After an exception nothing is updated.
    """

    def __init__(self, trainer: Trainer, updater: Updater) -> None:
        self._trainer, self._updater = trainer, updater
        self._losses: dict[str, Tensor] = {}
        self._has_loss = self._is_reduced = False
        self._toggled: list[Tensor] = []

    def __enter__(self) -> Self:
        self._toggled = self._updater.trainable_of_others()
        for parameter in self._toggled:
            parameter.requires_grad_(False)
        if self._updater.skipped is not None:
            self._updater.skipped.keep_buffers()
        self.clear()  # of an update that ended in an exception, too
        torch.clear_autocast_cache()  # of parameters that required a gradient, or did not
        return self

    def backward(
        self, loss: Tensor | Loss | Mapping[str, Tensor | Loss], *, retain_graph: bool = False
    ) -> None:
        """Add the gradients of a loss, or of several by name.

        Args:
            loss: as a model returns it in the default step.
            retain_graph: keep the graph for another backward.
        """
        if self._is_reduced:
            raise ConfigError("step: update.backward after update.reduce: expected update.clear")
        losses = total_loss(loss)
        self._has_loss = True
        updater = self._updater
        with self._without_autocast():
            if updater.is_weighted(losses):
                updater.weighted_backward(losses, is_last=False, retain_graph=retain_graph)
            else:
                fraction = 1 / self._trainer.accumulation
                updater.backward(losses["loss"] * fraction, retain_graph=retain_graph)
                for name, value in losses.items():
                    part = value.detach() * fraction
                    before = self._losses.get(name)
                    self._losses[name] = part if before is None else before + part
        torch.clear_autocast_cache()  # the step may change parameters from here on

    def reduce(self) -> None:
        """Average the gradients over ranks now, to use them before the end. A collective."""
        if self._is_reduced:
            return
        if not self._has_loss:
            raise ConfigError("step: update.reduce: expected update.backward(loss) before it")
        self._is_reduced = True
        weighted = self._updater.weighted
        if weighted is not None:
            weighted.close()
        self._trainer.strategy.reduce_gradients(self._updater.parameters)

    def clear(self) -> None:
        """Drop the gradients and losses so far."""
        clear_gradients(self._updater.optimizer)
        self._losses = {}
        self._has_loss = self._is_reduced = False
        if self._updater.weighted is not None:
            self._updater.weighted.clear()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for parameter in self._toggled:
            parameter.requires_grad_(True)
        if kind is not None:
            return
        updater, trainer = self._updater, self._trainer
        if not self._has_loss:
            raise ConfigError(
                f"step: update({updater.name!r}): expected update.backward(loss) inside; "
                "begin an update only where there is a loss"
            )
        scope: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if updater.name:
            scope = trainer.storage.name_scope(updater.name)
        with self._without_autocast(), scope:
            self.reduce()
            trainer.update_name = updater.name
            updater.apply(self._losses, None)
        torch.clear_autocast_cache()

    def _without_autocast(self) -> contextlib.AbstractContextManager[object]:
        return torch.autocast(self._trainer.device.type, enabled=False)

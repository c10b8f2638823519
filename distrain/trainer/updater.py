"""Updater: one optimizer's part of a step, from the backward to the cleared gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer

from distrain.distributed.without_profiler import clear_gradients, update
from distrain.heartbeat import Phase
from distrain.optim.optimizer import start_momentum
from distrain.scalar_names import GRAD_NORM, SKIPPED_UPDATE
from distrain.trainer.loss import WeightedLosses, check_first, unweighted
from distrain.trainer.nonfinite_gradients import SkippedUpdates
from distrain.trainer.weighted_gradients import EmptyUpdates, WeightedGradients

if TYPE_CHECKING:
    from distrain.trainer.trainer import Trainer


class Updater:
    """Backward and update of one optimizer.

    Args:
        trainer: whose hooks, storage and strategy are used.
        optimizer: of some or all parameters of its module.
        name: of the optimizer; "" if it is the only one.
        clip_norm, clip_value, precision, nonfinite, max_skipped: see `Trainer`.

    Attributes:
        parameters: of the optimizer.
        scaler: of the loss; disabled but for "fp16".
        weighted: gradients of losses with weights; None until there is one.
    """

    def __init__(
        self,
        trainer: Trainer,
        optimizer: Optimizer,
        *,
        name: str = "",
        clip_norm: float | None,
        clip_value: float | None,
        precision: str,
        nonfinite: str,
        max_skipped: int,
    ) -> None:
        self.name, self.optimizer = name, optimizer
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.scaler = torch.amp.GradScaler(trainer.device.type, enabled=precision == "fp16")
        self.weighted: WeightedGradients | None = None
        self.skipped: SkippedUpdates | None = None
        if nonfinite == "skip":
            self.skipped = SkippedUpdates(
                trainer.strategy,
                trainer.model,
                self.parameters,
                scaler=self.scaler,
                max_in_a_row=max_skipped,
            )
        self._trainer = trainer
        self._clip_norm, self._clip_value = clip_norm, clip_value
        self._clips = clip_norm is not None or clip_value is not None
        self._scales = self.scaler.is_enabled()

    def trainable_of_others(self) -> list[Tensor]:
        """Return the parameters of other optimizers that require gradients now."""
        others = (each for each in self._trainer.updaters.values() if each is not self)
        return [p for each in others for p in each.parameters if p.requires_grad]

    def prepare(self) -> None:
        """Prepare for training."""
        start_momentum(self.optimizer)
        self.weighted = None
        self._has_run = False  # a backward
        self._skipped_at = -1  # iteration of the last update that was skipped
        self._empty_updates = EmptyUpdates()

    def is_weighted(self, losses: Mapping[str, Tensor]) -> bool:
        """Whether losses take part in the mean by weights; those of all forwards, or of none.

        Raises:
            ConfigError: this is the first with a `Loss`, but not the first.
        """
        if losses.__class__ is dict and self.weighted is None:
            self._has_run = True
            return False
        if self.weighted is None:
            check_first(losses, has_run=self._has_run)
            trainer = self._trainer
            self.weighted = WeightedGradients(
                trainer.strategy, self.parameters, num_forwards=trainer.accumulation
            )
        return True

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Backward of a () loss."""
        if self.skipped is not None:
            loss = self.skipped.propagate_nonfinite(loss)
        if self._scales:
            loss = self.scaler.scale(loss)
        self._trainer.pulse.beat(Phase.BACKWARD)
        loss.backward(retain_graph=retain_graph)

    def weighted_backward(
        self, losses: Mapping[str, Tensor], *, is_last: bool, retain_graph: bool = False
    ) -> None:
        """Backward of the losses of a forward, see `WeightedGradients`. A collective if it is last.

        Args:
            losses: as `total_loss` returned them.
            is_last: whether it is the last forward of the step.
            retain_graph: keep the graph for another backward, if it is not the last.
        """
        assert self.weighted is not None
        weighted = losses if isinstance(losses, WeightedLosses) else unweighted(losses)
        if is_last:
            loss = self.weighted.close(weighted)
            assert loss is not None
            self.backward(loss)
        else:
            with self._trainer.strategy.reduced_backward(self._trainer.model):
                self.weighted.add(weighted, self.backward, retain_graph=retain_graph)

    def apply(self, losses: Mapping[str, Tensor], counts: Mapping[str, float] | None) -> None:
        """Put the losses, call `after_backward`, clip, update, and clear the gradients.

        Args:
            losses: of this rank, by name; unused where they have weights.
            counts: see `ScalarRecorder.put_losses`.
        """
        trainer = self._trainer
        is_empty = False
        if self.weighted is not None:
            losses, counts, is_empty = self.weighted.finish()
        trainer.storage.put_losses(losses, counts)
        if self._scales:
            self.scaler.unscale_(self.optimizer)
        trainer.call_after_backward()
        trainer.pulse.beat(Phase.OPTIMIZER)
        if self._may_update(losses, is_empty):
            if self._clips:
                self._clip_gradients()
            # a hook may have called the model: the next forward has to see the update
            trainer.strategy.free_gathered(trainer.module)
            if self._scales:
                self.scaler.step(self.optimizer)
            else:
                update(self.optimizer)
        if self._scales:
            self.scaler.update()
        clear_gradients(self.optimizer)

    def _clip_gradients(self) -> None:
        trainer = self._trainer
        trainer.grad_norm = trainer.strategy.clip(
            self.parameters, norm=self._clip_norm, value=self._clip_value
        )
        if trainer.grad_norm is None:
            return
        if self._scales:  # an overflow is no failure: the scaler skips the update
            trainer.storage.put_scalar(GRAD_NORM, trainer.grad_norm)
        else:
            trainer.storage.put_losses({GRAD_NORM: trainer.grad_norm})

    def _may_update(self, losses: Mapping[str, Tensor], is_empty: bool) -> bool:
        """Whether the update may be applied; equal on all ranks, as the gradients are."""
        trainer = self._trainer
        if self.weighted is not None:
            self._empty_updates.count(is_empty, iteration=trainer.iter)
        elif self.skipped is None:
            return True
        may = not is_empty and (
            self.skipped is None or self.skipped.may_update(losses, iteration=trainer.iter)
        )
        if not may:
            self._skipped_at = trainer.iter
        # of several updates in one iteration the last put counts
        is_skipped = self._skipped_at == trainer.iter
        trainer.storage.put_scalar(SKIPPED_UPDATE, float(is_skipped), smoothing_hint=False)
        return may

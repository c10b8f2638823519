"""Skip updates that are not finite, on all ranks alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distrain.checks import whole
from distrain.distributed.collectives import gather_to_all
from distrain.distributed.strategy import Strategy
from distrain.errors import NonFiniteLoss
from distrain.log import logger
from distrain.trainer.module_state import KeptBuffers


class _Rank(NamedTuple):
    """Report of one rank on an update that is skipped."""

    losses: list[str]  # not finite on this rank
    gradient_norm: float


class SkippedUpdates:
    """Decide for each update whether it may be applied; one read-back per step.

    All ranks must decide alike. The loss of a rank that is not finite makes its gradients NaN, and
    the mean over ranks makes those of all ranks NaN: the gradients are equal on all ranks, and so
    is the decision, without a collective of its own. Running statistics of a skipped batch are
    restored.

    Args:
        strategy: of the trainer.
        module: whose buffers are restored.
        parameters: whose gradients decide.
        scaler: an overflow is no failure while it lowers its scale, and does not count.
        max_in_a_row: number of skipped updates in a row; one more ends training.

    Raises:
        ConfigError: max_in_a_row < 1.
    """

    def __init__(
        self,
        strategy: Strategy,
        module: nn.Module,
        parameters: Sequence[Tensor],
        *,
        scaler: torch.amp.GradScaler,
        max_in_a_row: int,
    ) -> None:
        self._max = whole("trainer.max_skipped", max_in_a_row, least=1)
        self._parameters = parameters
        self._strategy = strategy
        self._modules = [part for part in module.modules() if part._buffers]
        self._kept = KeptBuffers([])
        self._scaler = scaler
        self._in_a_row = self._counted = 0

    def keep_buffers(self) -> None:
        """Copy the buffers; called before the forward."""
        self._kept = KeptBuffers(self._modules)

    @staticmethod
    def propagate_nonfinite(loss: Tensor) -> Tensor:
        """Return the loss unchanged; its gradients are NaN if it is not finite (0 * inf = NaN)."""
        return loss * (1 + 0 * loss.detach())

    def may_update(self, losses: Mapping[str, Tensor], *, iteration: int) -> bool:
        """Return whether the update may be applied; restore the buffers if not.

        Raises:
            NonFiniteLoss: more than max_in_a_row in a row; on all ranks at this iteration.
        """
        norm = self._strategy.gradient_norm(self._parameters)
        if bool(torch.isfinite(norm)):
            self._in_a_row = self._counted = 0
            return True
        self._kept.restore()
        names = [name for name, loss in losses.items() if not bool(torch.isfinite(loss))]
        # a collective, as all ranks decide alike
        ranks = [_Rank(*each) for each in gather_to_all([names, float(norm)])]
        self._in_a_row += 1
        lowers = self._scaler.is_enabled() and self._scaler.get_scale() > 1
        if not lowers or any(rank.losses for rank in ranks):
            self._counted += 1
        problem = _describe(ranks)
        if self._counted > self._max:
            raise NonFiniteLoss(
                f"{problem} at iteration {iteration}, after {self._max} skipped updates in a row "
                f"(trainer.max_skipped={self._max}). Lower optim.lr, clip gradients "
                "(trainer.clip_norm=1.0), or look at the data"
            )
        if self._in_a_row == 1:
            logger.warning("%s at iteration %d: this update is skipped", problem, iteration)
        return False


def _describe(ranks: list[_Rank]) -> str:
    """Name the losses that are not finite and their ranks, or the norm of the gradients."""
    names = sorted({name for rank in ranks for name in rank.losses})
    if not names:
        return f"the losses are finite, but the norm of the gradients is {ranks[0].gradient_norm}"
    bad = ", ".join(str(number) for number, rank in enumerate(ranks) if rank.losses)
    return f"{', '.join(names)} not finite on rank {bad} of {len(ranks)}"

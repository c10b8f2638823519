"""Updates that are not finite are left out, on all ranks alike, up to so many in a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distrain.distributed.collectives import gather_to_all
from distrain.distributed.fsdp import gradient_norm
from distrain.errors import ConfigError, NonFiniteLoss
from distrain.log import logger


class _Bad(NamedTuple):
    """One rank's part in an update that is left out."""

    losses: list[str]  # that are not finite here
    gradient_norm: float


class SkippedUpdates:
    """Decides of each update whether it may be applied; a read-back a step.

    What is not finite anywhere must become known everywhere: the loss of a rank whose loss is not
    finite is made to spoil its gradients, and the mean over ranks spoils those of all. So all ranks
    see the same gradients and decide alike, without a collective of their own. Running statistics
    of a batch that is left out are taken back.

    Args:
        module: whose buffers are taken back.
        parameters: whose gradients decide.
        max_in_a_row: of updates that are left out; one more ends training.
        scaler: an overflow is no failure while it lowers its scale, and does not count.

    Raises:
        ConfigError: max_in_a_row < 1.
    """

    def __init__(
        self,
        module: nn.Module,
        parameters: Iterable[Tensor],
        *,
        max_in_a_row: int,
        scaler: torch.amp.GradScaler,
    ) -> None:
        if max_in_a_row < 1:
            raise ConfigError(f"trainer.max_skipped={max_in_a_row}; it is at least 1")
        self._max = max_in_a_row
        self._parameters = list(parameters)
        self._buffers = list(module.buffers())
        self._kept = [torch.empty_like(buffer) for buffer in self._buffers]
        self._scaler = scaler
        self._in_a_row = self._counted = 0

    @torch.no_grad()
    def keep_buffers(self) -> None:
        """Remember the buffers; called before the forward."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            kept.copy_(buffer)

    @staticmethod
    def spoiling(loss: Tensor) -> Tensor:
        """Return the very loss, whose gradients are NaN if it is not finite: 0 * inf = NaN."""
        return loss * (1 + 0 * loss.detach())

    def may_update(self, losses: Mapping[str, Tensor], *, iteration: int) -> bool:
        """Return whether the update may be applied; take the buffers back if not.

        Args:
            losses: of this rank, by name.
            iteration: the current one.

        Raises:
            NonFiniteLoss: too many in a row; on all ranks at this iteration.
        """
        norm = gradient_norm(self._parameters)
        if bool(torch.isfinite(norm)):
            self._in_a_row = self._counted = 0
            return True
        with torch.no_grad():
            for kept, buffer in zip(self._kept, self._buffers, strict=True):
                buffer.copy_(kept)
        names = [name for name, loss in losses.items() if not bool(torch.isfinite(loss))]
        # a collective: all ranks are here
        ranks = [_Bad(*each) for each in gather_to_all([names, float(norm)])]
        self._in_a_row += 1
        lowers = self._scaler.is_enabled() and self._scaler.get_scale() > 1
        if not lowers or any(bad.losses for bad in ranks):
            self._counted += 1
        what = _describe(ranks)
        if self._counted > self._max:
            raise NonFiniteLoss(
                f"{what} at iteration {iteration}; so were {self._max} updates in a row before it "
                f"(trainer.max_skipped={self._max}), and none of them was applied. Lower optim.lr, "
                "clip gradients (trainer.clip_norm=1.0), or look at the data"
            )
        if self._in_a_row == 1:
            logger.warning("%s at iteration %d: this update is left out", what, iteration)
        return False


def _describe(ranks: list[_Bad]) -> str:
    """Say which losses are not finite on which ranks, or what the norm of the gradients is."""
    names = sorted({name for bad in ranks for name in bad.losses})
    if not names:
        return f"the losses are finite, but the norm of the gradients is {ranks[0].gradient_norm}"
    where = ", ".join(str(rank) for rank, bad in enumerate(ranks) if bad.losses)
    return f"{', '.join(names)} not finite on rank {where} of {len(ranks)}"

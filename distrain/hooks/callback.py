"""A hook made of functions."""

from __future__ import annotations

from collections.abc import Callable

from distrain.trainer.hook import HookBase
from distrain.trainer.loop import TrainerBase

Callback = Callable[[TrainerBase], None]


class CallbackHook(HookBase):
    """Calls a function with the trainer at each moment that has one.

    Args:
        before_train: run at that moment of `HookBase`; so are the others.
        before_step: as above.
        after_backward: as above.
        after_step: as above.
        after_train: as above.
    """

    def __init__(
        self,
        *,
        before_train: Callback | None = None,
        before_step: Callback | None = None,
        after_backward: Callback | None = None,
        after_step: Callback | None = None,
        after_train: Callback | None = None,
    ) -> None:
        self._before_train = before_train
        self._before_step = before_step
        self._after_backward = after_backward
        self._after_step = after_step
        self._after_train = after_train
        self.only_closes = after_train is None

    def before_train(self) -> None:
        """Call its function."""
        if self._before_train:
            self._before_train(self.trainer)

    def before_step(self) -> None:
        """Call its function."""
        if self._before_step:
            self._before_step(self.trainer)

    def after_backward(self) -> None:
        """Call its function."""
        if self._after_backward:
            self._after_backward(self.trainer)

    def after_step(self) -> None:
        """Call its function."""
        if self._after_step:
            self._after_step(self.trainer)

    def after_train(self) -> None:
        """Call its function."""
        if self._after_train:
            self._after_train(self.trainer)

"""CallbackHook: functions called at the moments of training."""

from __future__ import annotations

from collections.abc import Callable

from distrain.checks import did_you_mean
from distrain.errors import ConfigError
from distrain.trainer.hook import MOMENTS, HookBase, Moment
from distrain.trainer.loop import TrainerBase

Callback = Callable[[TrainerBase], None]


class CallbackHook(HookBase):
    """Calls a function per moment, with the trainer: `CallbackHook(after_step=function)`.

    ConfigError for a name that is not a moment of `HookBase`.
    """

    def __init__(self, **functions: Callback | None) -> None:
        for name in functions:
            if name not in MOMENTS:
                raise ConfigError(f"{name}: expected a moment; {did_you_mean(name, MOMENTS)}")
        self._functions = functions
        self.only_closes = functions.get("after_train") is None


def _method(moment: Moment) -> Callable[[CallbackHook], None]:
    def call(self: CallbackHook) -> None:
        function = self._functions.get(moment)
        if function is not None:
            function(self.trainer)

    return call


for _moment in MOMENTS:
    setattr(CallbackHook, _moment, _method(_moment))

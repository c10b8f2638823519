"""The training loop, its hooks and its step."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.trainer.hook import HookBase
    from distrain.trainer.loop import TrainerBase
    from distrain.trainer.trainer import Trainer

_MODULE_OF = {
    "HookBase": "hook",
    "Trainer": "trainer",
    "TrainerBase": "loop",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = [
    "HookBase",
    "Trainer",
    "TrainerBase",
]

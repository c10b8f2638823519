"""distrain: a distributed training service.

The public names come from their modules when they are first used, so that the command line starts
without torch.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distrain.checkpoint.store import CheckpointStore
    from distrain.events.history import HistoryBuffer
    from distrain.events.storage import EventStorage, get_event_storage
    from distrain.job.load import load
    from distrain.job.resume import resume
    from distrain.optim.groups import param_groups
    from distrain.schedule.schedules import WarmupCosineLR, WarmupMultiStepLR
    from distrain.trainer.hook import HookBase
    from distrain.trainer.loop import TrainerBase
    from distrain.trainer.loss import Loss
    from distrain.trainer.step import Step
    from distrain.trainer.trainer import Trainer

_MODULE_OF = {
    "CheckpointStore": "checkpoint.store",
    "EventStorage": "events.storage",
    "HistoryBuffer": "events.history",
    "HookBase": "trainer.hook",
    "Loss": "trainer.loss",
    "Step": "trainer.step",
    "Trainer": "trainer.trainer",
    "TrainerBase": "trainer.loop",
    "WarmupCosineLR": "schedule.schedules",
    "WarmupMultiStepLR": "schedule.schedules",
    "get_event_storage": "events.storage",
    "load": "job.load",
    "param_groups": "optim.groups",
    "resume": "job.resume",
}

__all__ = [
    "CheckpointStore",
    "EventStorage",
    "HistoryBuffer",
    "HookBase",
    "Loss",
    "Step",
    "Trainer",
    "TrainerBase",
    "WarmupCosineLR",
    "WarmupMultiStepLR",
    "get_event_storage",
    "load",
    "param_groups",
    "resume",
]


def __getattr__(name: str) -> object:
    """Return a public name, or a module such as `distrain.hooks` (PEP 562)."""
    if name not in _MODULE_OF:
        if name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return import_module(f"{__name__}.{name}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names too."""
    return sorted({*globals(), *__all__})

"""Hooks of a LightningModule: called, replaced, or refused by name; none is silently ignored.

The names are those of Lightning 2.6: ModelHooks, DataHooks, CheckpointHooks and the methods of
LightningModule that its Trainer calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distrain.distributed.ranks import topology
from distrain.errors import ConfigError

_LIBRARY = ("lightning.", "pytorch_lightning.", "lightning_fabric.", "torch.")
_HOOK = "write it as a hook, with {}"

CALLED = {
    "configure_model": "when it is built",
    "setup": "when it is built, with `fit`",
    "configure_optimizers": "with `optim: null`, for the optimizer and its schedule",
    "on_after_batch_transfer": "in front of the training step and the validation step",
    "training_step": "as the forward",
    "validation_step": "in the evaluation",
}
REPLACED = {
    "train_dataloader": "by `data.train`",
    "val_dataloader": "by `data.eval`",
}
OTHER_COMMANDS = (  # Lightning's fit does not call them either
    "test_step",
    "test_dataloader",
    "on_test_start",
    "on_test_end",
    "on_test_batch_start",
    "on_test_batch_end",
    "on_test_epoch_start",
    "on_test_epoch_end",
    "on_test_model_eval",
    "on_test_model_train",
    "predict_step",
    "predict_dataloader",
    "on_predict_start",
    "on_predict_end",
    "on_predict_batch_start",
    "on_predict_batch_end",
    "on_predict_epoch_start",
    "on_predict_epoch_end",
    "on_predict_model_eval",
)
_STEP = "write the step as a distrain.TrainerBase with a run_step of its own"
_EVALUATION = "the evaluation is that of hooks.eval; write a hook"
REFUSED = {
    "backward": _STEP,
    "optimizer_step": _STEP,
    "optimizer_zero_grad": _STEP,
    "lr_scheduler_step": "give a schedule that steps once per iteration",
    "configure_gradient_clipping": "trainer.clip_norm or trainer.clip_value clips",
    "on_before_optimizer_step": _HOOK.format("after_backward"),
    "on_before_zero_grad": _HOOK.format("after_backward"),
    "on_before_backward": _STEP,
    "on_after_backward": _HOOK.format("after_backward"),
    "on_fit_start": _HOOK.format("before_train"),
    "on_fit_end": _HOOK.format("after_train"),
    "on_train_start": _HOOK.format("before_train"),
    "on_train_end": _HOOK.format("after_train"),
    "on_train_batch_start": _HOOK.format("before_step"),
    "on_train_batch_end": _HOOK.format("after_step"),
    "on_train_epoch_start": _HOOK.format("before_step"),
    "on_train_epoch_end": _HOOK.format("after_step"),
    "on_validation_start": _EVALUATION,
    "on_validation_end": _EVALUATION,
    "on_validation_batch_start": _EVALUATION,
    "on_validation_batch_end": _EVALUATION,
    "on_validation_epoch_start": _EVALUATION,
    "on_validation_epoch_end": _EVALUATION,
    "on_validation_model_zero_grad": _EVALUATION,
    "on_validation_model_eval": _EVALUATION,
    "on_validation_model_train": _EVALUATION,
    "configure_callbacks": "name hooks in the configuration",
    "configure_sharded_model": "trainer.strategy=fsdp shards the model",
    "prepare_data": "prepare the data before training",
    "teardown": _HOOK.format("after_train"),
    "on_before_batch_transfer": "let the data set collate, by get_batch",
    "transfer_batch_to_device": "a batch of tensors in lists and dicts is moved by the trainer",
    "on_save_checkpoint": "keep the state in buffers, or in a hook's state_dict",
    "on_load_checkpoint": "keep the state in buffers, or in a hook's state_dict",
}


def check_hooks(module: object) -> None:
    """Raise ConfigError for the first hook that a module overrides and that would not be called."""
    base = {n for c in type(module).__mro__ if _is_of_library(c) for n in vars(c)}
    known = {*CALLED, *REPLACED, *OTHER_COMMANDS, *REFUSED}
    found = sorted(name for name in base - known if name.startswith("on_") and name != "on_gpu")
    unknown = dict.fromkeys(found, "this version of the hooks is not known")
    for name, advice in (REFUSED | unknown).items():
        if overrides(module, name):
            raise ConfigError(
                f"module: {type(module).__name__} overrides {name}, which is not called; {advice}"
            )


def overrides(module: object, name: str) -> bool:
    """Whether a module has a method that is not the one of its library."""
    if name in vars(module):
        return True
    owner = next((c for c in type(module).__mro__ if name in vars(c)), None)
    return owner is not None and not _is_of_library(owner)


def _is_of_library(cls: type) -> bool:
    return f"{cls.__module__}.".startswith(_LIBRARY)


class TrainerView:
    """Stands for `self.trainer` of a module: progress and place among the ranks, read-only.

    Attributes:
        global_step: optimizer steps done.
    """

    logger = None
    sanity_checking = False

    def __init__(self, epoch_iters: int | None) -> None:
        self.global_step = 0
        self._epoch_iters = epoch_iters

    @property
    def loggers(self) -> list[Any]:
        """None: scalars are logged by `self.log`, images by `distrain.get_event_storage()`."""
        return []

    @property
    def current_epoch(self) -> int:
        """Epochs done: `global_step // epoch_iters`.

        Raises:
            ConfigError: `epoch_iters` was not given.
        """
        if self._epoch_iters is None:
            raise ConfigError(
                "epoch_iters: expected a value, as the module reads current_epoch: the size of "
                "the data set over data.batch_size"
            )
        return self.global_step // self._epoch_iters

    @property
    def global_rank(self) -> int:
        """Rank of this process."""
        return topology().rank

    @property
    def local_rank(self) -> int:
        """Rank of this process on its node."""
        return topology().local_rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return topology().world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return topology().is_main

    def __getattr__(self, name: str) -> Any:
        """Raise: nothing else of Lightning's Trainer exists."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise _NotThere(
            f"module: self.trainer.{name} does not exist here; available: global_step, "
            "current_epoch, global_rank, local_rank, world_size, is_global_zero"
        )


class _NotThere(ConfigError, AttributeError):
    """An attribute of the trainer that does not exist; `getattr(..., default)` works."""


def table() -> Mapping[str, str]:
    """Return what becomes of each hook, by name."""
    return {
        **{name: f"called {when}" for name, when in CALLED.items()},
        **{name: f"replaced {by}" for name, by in REPLACED.items()},
        **{name: f"refused: {advice}" for name, advice in REFUSED.items()},
        **dict.fromkeys(OTHER_COMMANDS, "not part of training"),
    }

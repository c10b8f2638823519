"""Hooks of a LightningModule: each is called, replaced or refused by name; none is ignored.

The names are those of Lightning 2.6: ModelHooks, DataHooks, CheckpointHooks and the methods of
LightningModule that its Trainer calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distrain.distributed.ranks import topology
from distrain.errors import ConfigError

_LIBRARY = ("lightning.", "pytorch_lightning.", "lightning_fabric.", "torch.")

CALLED = {
    "configure_model": "when it is built",
    "setup": "when it is built, with `fit`",
    "configure_optimizers": "with `optim: null`, for the optimizer and its schedule",
    "on_after_batch_transfer": "before the training step and the validation step",
    "training_step": "as the forward",
    "validation_step": "in the evaluation",
    "predict_step": "for `eval.metrics` and for `--predict`",
}
REPLACED = {
    "train_dataloader": "by `data.train`",
    "val_dataloader": "by `data.eval`",
}
_MOMENTS = ("start", "end", "batch_start", "batch_end", "epoch_start", "epoch_end")
# Lightning's fit does not call them either
OTHER_COMMANDS = (
    *("test_step", "test_dataloader", "on_test_model_train"),
    "predict_dataloader",
    *(
        f"on_{command}_{moment}"
        for command in ("test", "predict")
        for moment in (*_MOMENTS, "model_eval")
    ),
)
_STEP = "write the step as a distrain.Step"
_EVALUATION = "the evaluation is that of hooks.eval; write a hook"
_STATE = "keep the state in buffers, or in a hook's state_dict"
REFUSED = {
    **dict.fromkeys(
        ("backward", "optimizer_step", "optimizer_zero_grad", "on_before_backward"), _STEP
    ),
    **{
        name: f"write it as a hook, with {moment}"
        for moment, names in {
            "before_train": ("on_fit_start", "on_train_start"),
            "before_step": ("on_train_batch_start", "on_train_epoch_start"),
            "after_backward": (
                *("on_before_optimizer_step", "on_before_zero_grad", "on_after_backward"),
            ),
            "after_step": ("on_train_batch_end", "on_train_epoch_end"),
            "after_train": ("on_fit_end", "on_train_end", "teardown"),
        }.items()
        for name in names
    },
    **{
        f"on_validation_{moment}": _EVALUATION
        for moment in (*_MOMENTS, "model_zero_grad", "model_eval", "model_train")
    },
    "lr_scheduler_step": "give a schedule that steps once per iteration",
    "configure_gradient_clipping": "trainer.clip_norm or trainer.clip_value clips",
    "configure_callbacks": "name hooks in the configuration",
    "configure_sharded_model": "trainer.strategy=fsdp shards the model",
    "prepare_data": "prepare the data before training",
    "on_before_batch_transfer": "let the data set collate, by get_batch",
    "transfer_batch_to_device": "a batch of tensors in lists and dicts is moved by the trainer",
    "on_save_checkpoint": _STATE,
    "on_load_checkpoint": _STATE,
    # of Lightning 1; Lightning 2 raises for the first two, and does not call the others
    "training_epoch_end": "write it as a hook, with after_step",
    "validation_epoch_end": _EVALUATION,
    "training_step_end": "return the loss from training_step",
    "validation_step_end": "log the values in validation_step",
    **{
        f"on_{unit}_{moment}": f"write it as a hook, with {method}"
        for moment, method in (("start", "before_step"), ("end", "after_step"))
        for unit in ("epoch", "batch")
    },
}
# set on the module, in place of the library's
REPLACED_METHODS = (
    *("log", "log_dict", "manual_backward", "clip_gradients", "optimizers", "lr_schedulers"),
    *("toggle_optimizer", "untoggle_optimizer"),
)


def check_hooks(module: object) -> None:
    """Raise ConfigError for the first overridden hook or method that would not be called."""
    base = {n for c in type(module).__mro__ if _is_of_library(c) for n in vars(c)}
    known = {*CALLED, *REPLACED, *OTHER_COMMANDS, *REFUSED}
    found = sorted(name for name in base - known if name.startswith("on_") and name != "on_gpu")
    unknown = dict.fromkeys(found, "this version of the hooks is unknown")
    for name, advice in (REFUSED | unknown).items():
        if overrides(module, name):
            raise ConfigError(
                f"module: {type(module).__name__} overrides {name}, which is not called; {advice}"
            )
    for name in REPLACED_METHODS:
        if name in base and _is_in_own_class(module, name):
            raise ConfigError(
                f"module: {type(module).__name__} overrides {name}, which the adapter replaces; "
                f"give the method another name, and let it call self.{name}"
            )


def overrides(module: object, name: str) -> bool:
    """Return whether a module overrides a method of its library."""
    return name in vars(module) or _is_in_own_class(module, name)


def _is_in_own_class(module: object, name: str) -> bool:
    owner = next((c for c in type(module).__mro__ if name in vars(c)), None)
    return owner is not None and not _is_of_library(owner)


def _is_of_library(cls: type) -> bool:
    return f"{cls.__module__}.".startswith(_LIBRARY)


class TrainerView:
    """`self.trainer` of a module: progress and ranks, read-only.

    Attributes:
        global_step: optimizer steps done; with manual optimization those of all optimizers.
        iteration: the current one.
    """

    logger = None
    sanity_checking = False

    def __init__(self, epoch_iters: int | None) -> None:
        self.global_step = self.iteration = 0
        self._epoch_iters = epoch_iters

    @property
    def loggers(self) -> list[Any]:
        """Empty: `self.log` takes scalars, `distrain.get_event_storage()` images."""
        return []

    @property
    def current_epoch(self) -> int:
        """Finished epochs: `iteration // epoch_iters`.

        Raises:
            ConfigError: `epoch_iters` was not given.
        """
        if self._epoch_iters is None:
            raise ConfigError(
                "epoch_iters: expected a value, as the module reads current_epoch: the size of "
                "the data set over data.batch_size"
            )
        return self.iteration // self._epoch_iters

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
        if name.startswith("__"):
            raise AttributeError(name)
        raise _Missing(
            f"module: self.trainer.{name} does not exist here; available: global_step, "
            "current_epoch, global_rank, local_rank, world_size, is_global_zero"
        )


class _Missing(ConfigError, AttributeError):
    """Missing attribute of the trainer; `getattr(..., default)` works."""


def table() -> Mapping[str, str]:
    """Return the treatment of each hook, by name."""
    return {
        **{name: f"called {when}" for name, when in CALLED.items()},
        **{name: f"replaced {by}" for name, by in REPLACED.items()},
        **{name: f"refused: {advice}" for name, advice in REFUSED.items()},
        **dict.fromkeys(OTHER_COMMANDS, "not part of training"),
    }

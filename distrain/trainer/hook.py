"""HookBase: callbacks at six moments of the training loop."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from distrain.errors import ConfigError

if TYPE_CHECKING:
    from distrain.trainer.loop import TrainerBase

Moment = Literal[
    "before_train",
    "before_step",
    "after_backward",
    "after_step",
    "after_last_step",
    "after_train",
]
MOMENTS: tuple[Moment, ...] = get_args(Moment)
STEP_MOMENTS: tuple[Moment, ...] = ("before_step", "after_backward", "after_step")


_MISSPELT_RATIO = 0.88  # of difflib, to after_step: after_setp has 0.90, after_state 0.86


class HookBase:
    """Base class of the hooks that a trainer calls while it trains.

    The calling sequence, on every rank::

        hook.before_train()
        for iteration in range(start_iter, max_iter):
            hook.before_step()
            trainer.run_step()          # forward, backward, hook.after_backward(), update
            hook.after_step()
        hook.after_last_step()          # not if training failed
        hook.after_train()              # also when training failed: see trainer.error

    Only the moments that a class overrides are called. Hooks run in the order of `order`, and in
    the order given where it is equal.

    Attributes:
        trainer: the trainer that the hook is registered with; set before `before_train`.
        order: smaller runs first. 10 timers, 20 schedules, 50 hooks of users, 60 evaluation,
            70 decisions on its result, 80 checkpoints, 90 writers. A hook above 80 must not put
            scalars or change state: the checkpoint of the iteration is made already.
        ranks: "all", or "main" for a hook that runs on rank 0 only (it must not communicate).
        order_at_end: order among the calls of `after_train`; None is `order`. 75 for writers: their
            last rows are on the disk before the final checkpoint.
        part: the part of a checkpoint that holds its state.
        is_idle: set in `before_train` by a hook that has nothing to do in this run: its
            `before_step`, `after_backward` and `after_step` are not called then.
        only_closes: whether `after_train` only closes resources. Before any other `after_train` the
            trained state is saved, so that nothing is lost if it fails.
    """

    trainer: TrainerBase
    order: int = 50
    order_at_end: ClassVar[int | None] = None
    ranks: ClassVar[Literal["all", "main"]] = "all"
    part: ClassVar[str] = "hooks"
    is_idle: bool = False
    only_closes: bool = False

    def before_train(self) -> None:
        """Run once, before the first iteration."""

    def before_step(self) -> None:
        """Run before each iteration."""

    def after_backward(self) -> None:
        """Run between backward and update: gradients are complete and reduced over ranks.

        With trainer.precision=fp16 they are unscaled already; where the scaled loss overflowed,
        they hold inf or NaN, and the update is skipped.
        """

    def after_step(self) -> None:
        """Run after each iteration."""

    def after_last_step(self) -> None:
        """Run once, after the last iteration and before any `after_train`, unless training failed.

        The scalars of all iterations are in the histories. An error raised here is a failure of
        training: the state is not saved.
        """

    def after_train(self) -> None:
        """Run once, at the end; also after a failure, see `trainer.error`.

        Other ranks may be dead then, so a hook communicates here only if `trainer.error` is None.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a resumed run; equal on all ranks, as rank 0's is saved."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `state_dict` returned; tensors are on the CPU."""


def check_moments(kind: type[HookBase]) -> None:
    """Raise ConfigError if a method of a hook has almost a moment's name: it is never called."""
    for name in dir(kind):
        if name.startswith("_") or hasattr(HookBase, name) or not callable(getattr(kind, name)):
            continue
        for moment in MOMENTS:
            if SequenceMatcher(None, name.lower(), moment).ratio() >= _MISSPELT_RATIO:
                raise ConfigError(
                    f"hook {kind.__module__}.{kind.__qualname__}: {name} is never called: expected "
                    f"{moment}; rename it, or give a helper another name"
                )

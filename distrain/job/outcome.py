"""The outcome of a run: whether it is done, stopped or finished, and saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distrain.checkpoint.store import CheckpointStore, SaveFailed
from distrain.errors import ExitCode
from distrain.events.reduction import STOP_REQUESTED
from distrain.log import logger
from distrain.trainer.trainer import Trainer


def why_done(start_iter: int, state: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> str:
    """Return why no iteration is left to train; "" if one is.

    Args:
        start_iter: number of iterations done.
        state: of the checkpoint that the run continues from, if any.
        settings: `trainer` of the configuration.
    """
    max_iter, window = settings["max_iter"], settings["window"]
    if state is not None and "end" in state:
        return ""
    if start_iter >= max_iter:
        return f"has done its {start_iter} iterations already"
    # the same command again does not continue an early stop, which takes effect where a window ends
    if state is not None and state["early_stop"] >= max_iter and start_iter % window == 0:
        return (
            f"stopped early after {start_iter} of {max_iter} iterations; "
            "a larger trainer.max_iter trains on"
        )
    return ""


def outcome_of(trainer: Trainer) -> ExitCode:
    """Return STOPPED or FINISHED, of a training without an exception."""
    stopped = trainer.reduction.stop == STOP_REQUESTED and trainer.iter_done < trainer.max_iter
    return ExitCode.STOPPED if stopped else ExitCode.FINISHED


def conclude(
    trainer: Trainer,
    outcome: ExitCode,
    run_dir: str,
    checkpoints: CheckpointStore,
    *,
    may_be_unsaved: bool,
) -> None:
    """Log the end of a run, on rank 0, once its last iteration is saved.

    Args:
        trainer: has trained.
        outcome: see `outcome_of`.
        run_dir: folder of the run.
        checkpoints: of the run.
        may_be_unsaved: no hook saves checkpoints; a finished run needs none.

    Raises:
        SaveFailed: it is not saved; names the newest checkpoint.
    """
    done, start_iter = trainer.iter_done, trainer.start_iter
    is_saved = done == checkpoints.last_saved or (done == start_iter and not trainer.ends_only)
    stopped = outcome is ExitCode.STOPPED
    if not is_saved and (stopped or not may_be_unsaved):
        newest = checkpoints.last_saved or start_iter
        left = f"the newest checkpoint is that of iteration {newest}" if newest else "there is none"
        raise SaveFailed(
            f"{'stopped' if stopped else 'trained'} up to iteration {done}, but without a "
            f"checkpoint of it: {checkpoints.last_error or 'no hook saves it'}; {left}"
        )
    # the values of the last row, logged above
    latest = trainer.storage.scalars_until(trainer.iter_done - 1, window_size=trainer.window)
    shown = "  ".join(
        f"{name if name == 'eval/loss' else name.removeprefix('eval/')} {value:.4g}"
        for name, (value, _) in latest.items()
        if name == "loss" or name.endswith("/loss") or name.startswith("eval/")
    )
    end = "stopped, run again to continue:" if stopped else "finished:"
    logger.info("%s %d of %d iterations  %s", end, done, trainer.max_iter, shown)
    logger.info("the run is in %s; look at it with: tensorboard --logdir %s", run_dir, run_dir)
    if not is_saved:
        logger.warning("no checkpoint of the end was saved (hooks.checkpoint=null)")

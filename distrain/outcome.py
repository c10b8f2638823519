"""The end of a run: how it ended, and whether that is on the disk."""

from __future__ import annotations

from distrain.checkpoint import CheckpointStore, SaveFailed
from distrain.errors import ExitCode
from distrain.log import logger
from distrain.reduction import STOP_REQUESTED
from distrain.trainer import Trainer


def outcome_of(trainer: Trainer) -> ExitCode:
    """Return how a training ended that raised nothing."""
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
    """Log the end of a run, on rank 0, if what was trained is on the disk.

    Args:
        trainer: has trained.
        outcome: see `outcome_of`.
        run_dir: folder of the run.
        checkpoints: of the run.
        may_be_unsaved: a finished run needs no checkpoint, as no hook was to save one.

    Raises:
        SaveFailed: it is not; names the newest checkpoint that there is.
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
    # as in the last row, which stands above
    latest = trainer.storage.scalars_until(trainer.iter_done - 1, window_size=trainer.window)
    shown = "  ".join(
        f"{name if name == 'eval/loss' else name.removeprefix('eval/')} {value:.4g}"
        for name, (value, _) in latest.items()
        if name == "loss" or name.startswith("eval/")
    )
    what = "stopped, run again to continue:" if stopped else "finished:"
    logger.info("%s %d of %d iterations  %s", what, done, trainer.max_iter, shown)
    logger.info("the run is in %s; look at it with: tensorboard --logdir %s", run_dir, run_dir)
    if not is_saved:
        logger.warning("no checkpoint of the end was saved (hooks.checkpoint=null)")

"""Choose the checkpoint to continue from: the newest that is valid, of this run, and fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from distrain.checkpoint import format as fmt
from distrain.checkpoint.catalog import clear_leftovers, find_all, of_another_run
from distrain.checkpoint.decode import load_checkpoint
from distrain.checkpoint.retention import read_run_id
from distrain.checkpoint.store import CheckpointStore
from distrain.distributed.collectives import broadcast_from_main
from distrain.distributed.ranks import topology
from distrain.distributed.rng import restore_random_states
from distrain.errors import ConfigError, RunFailed, RunRefused
from distrain.files.retry import retried, unreadable
from distrain.log import logger
from distrain.progress import waiting
from distrain.trainer.trainer import Trainer

PARTS: dict[str, type] = {
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "stream": dict,
    "histories": dict,
    "rng": dict,
}
"""Parts of every checkpoint of a run, and their types."""

_SHOWN = 3  # names in a message

State = dict[str, Any]


def resume(trainer: Trainer, checkpoints: CheckpointStore) -> int:
    """Load the newest valid checkpoint in a script; return the first iteration for `train`.

    0 without checkpoints. The trainer gets the state of model, optimizer, schedule, hooks and data;
    each rank its random generators, where the number of ranks is that of the checkpoint. A
    collective. ::

        checkpoints = distrain.CheckpointStore("runs/script/checkpoints")
        hooks = [PeriodicCheckpointer(100, checkpoints=checkpoints)]
        trainer = distrain.Trainer(model, optimizer, loader, hooks=hooks)
        trainer.train(distrain.resume(trainer, checkpoints), 1000)

    Raises:
        ConfigError: the model is sharded; such runs continue by the command.
        RunRefused: none of the checkpoints can be continued from.
        RunFailed: one cannot be read. No file was changed in either case.
    """
    if trainer.is_sharded:
        raise ConfigError(
            "resume: expected a model that is not sharded; python -m distrain does it"
        )
    start_iter, state = resume_point(checkpoints.folder, trainer.module)
    if state is None:
        return 0
    try:
        trainer.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        why = f"the checkpoint of iteration {start_iter} does not fit this trainer: {error}"
        raise RunRefused(f"{checkpoints.folder}: {why}") from error
    restore_generators(state)
    return start_iter


def restore_generators(state: Mapping[str, Any]) -> bool:
    """Restore this rank's random generators; False where the number of ranks has changed."""
    where, saved = topology(), state["rng"]["ranks"]
    if len(saved) != where.world_size:
        return False
    restore_random_states(saved[where.rank])
    return True


def resume_point(folder: Path, model: nn.Module) -> tuple[int, State | None]:
    """Return the first iteration and the state to load; (0, None) without checkpoints.

    Rank 0 chooses and all ranks load the same one. A collective.

    Args:
        folder: of the run's checkpoints.
        model: this run's, before it is wrapped. Its weights may be overwritten.

    Raises:
        RunRefused: none of the checkpoints can be continued from.
        RunFailed: one cannot be read. No file was changed in either case.
    """
    state: State | None = None
    name, failure, is_final = "", "", False
    if topology().is_main:
        try:
            with waiting("checking the checkpoints"):
                name, state = newest_fitting(folder, model)
        except (OSError, RunRefused) as error:
            is_final = isinstance(error, RunRefused)
            failure = str(error) if is_final else unreadable(folder, error)
    name, failure, is_final = broadcast_from_main([name, failure, is_final])
    if failure:
        raise (RunRefused if is_final else RunFailed)(failure)
    if name and state is None:
        path = folder / name
        try:
            with waiting(f"reading {name}"):
                state = load_checkpoint(path)
        except (OSError, fmt.CheckpointDamaged) as error:
            raise RunFailed(f"{unreadable(path, error)} (on rank {topology().rank})") from error
    return (0 if state is None else int(state["stream"]["iteration"])), state


def has_checkpoints(folder: Path) -> bool:
    """Whether rank 0 finds checkpoints in a folder, or cannot read it. A collective."""
    found = False
    if topology().is_main:
        try:
            found = bool(find_all(folder, with_trained=True))
        except OSError:  # `resume_point` reports it
            found = True
    return bool(broadcast_from_main(found))


def newest_fitting(folder: Path, model: nn.Module) -> tuple[str, State | None]:
    """Return the folder name and the state of the newest checkpoint to continue from.

    ("", None) without any. It may be a trained state whose end is left, see `Found.is_end_left`.
    Skipped checkpoints are logged as warnings.

    Raises:
        RunRefused: none of the checkpoints can be continued from.
        OSError: one cannot be read; an older one would lose its iterations.
    """
    clear_leftovers(folder)
    run_id = read_run_id(str(folder))
    skipped: list[str] = []
    for path in reversed(retried(lambda: find_all(folder, with_trained=True))):
        try:
            state = load_checkpoint(path)
            why = _misfit(path, state, run_id, model)
        except fmt.CheckpointDamaged as error:
            why = str(error)
        if not why:
            return path.name, state
        logger.warning("checkpoint passed over: %s", why)
        skipped.append(why)
    if skipped:
        raise RunRefused(
            f"{folder}: none of {len(skipped)} checkpoints can be continued from ({skipped[0]}); "
            "begin another run with run.name=..., or move this folder away to begin at 0"
        )
    return "", None


def _misfit(path: Path, state: State, run_id: str | None, model: nn.Module) -> str:
    """Return why a valid checkpoint does not fit this run; "" if it does."""
    manifest = fmt.read_manifest(str(path))
    if why := of_another_run(path, manifest["run_id"], run_id):
        return why
    missing = [name for name, kind in PARTS.items() if not isinstance(state.get(name), kind)]
    if missing:
        return f"{path} lacks parts of every run: {', '.join(missing)}"
    if state["stream"].get("iteration") != manifest["iteration"]:
        return f"{path} has the position in the data of another iteration"
    if not isinstance(state["rng"].get("ranks"), list) or not state["rng"]["ranks"]:
        return f"{path} lacks the random generators of the ranks"
    saved = state["optimizer"]  # of one optimizer, or of several by name
    states = [saved] if "param_groups" in saved else [*saved.values()]
    if not states or not all({"state", "param_groups"} <= set(each) for each in states):
        return f"{path} lacks the state of the optimizer"
    try:  # as it will be loaded: a model may have its own load_state_dict
        model.load_state_dict(state["model"])
    except (RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        return f"{path} is of another model: {_difference(state['model'], model, error)}"
    return ""


def _difference(saved: Mapping[str, Any], model: nn.Module, error: Exception) -> str:
    """Return the first differences of a saved model from this one."""
    own = model.state_dict()
    lines = [f"it has {name}" for name in saved if name not in own]
    lines += [f"it lacks {name}" for name in own if name not in saved]
    for name, tensor in own.items():
        there = saved.get(name)
        if isinstance(tensor, Tensor) and isinstance(there, Tensor) and tensor.shape != there.shape:
            lines.append(f"its {name} is {list(there.shape)}, here {list(tensor.shape)}")
    if not lines:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    more = f" and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return ", ".join(lines[:_SHOWN]) + more

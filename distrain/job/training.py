"""Train as one rank: from the resolved configuration to the exit code."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from distrain import heartbeat, log
from distrain.checkpoint.store import CheckpointStore
from distrain.data.loader import Loader
from distrain.distributed.ranks import Topology, process_group
from distrain.distributed.rng import seed_everything
from distrain.errors import ConfigError, ExitCode
from distrain.heartbeat import Phase
from distrain.job.build import build_parts
from distrain.job.checkpoints import RunMirror, open_store
from distrain.job.model import build_model
from distrain.job.outcome import conclude, outcome_of, why_done
from distrain.job.restore import largest_forward, load_state
from distrain.job.resume import has_checkpoints, restore_generators, resume_point
from distrain.job.stop_signals import stop_signals
from distrain.job.strategy import build_strategy
from distrain.process.environment import env_int, restart_count
from distrain.run_layout import LOGS
from distrain.runfolder.epoch_file import write_epoch
from distrain.runfolder.watch import FolderWatch
from distrain.text import counted
from distrain.trainer.numerics import numerics
from distrain.trainer.trainer import Trainer

Conf = dict[str, Any]


def train(conf: Conf, run_dir: str) -> ExitCode:
    """Train as one rank; return FINISHED, or STOPPED with a checkpoint saved.

    Args:
        conf: resolved configuration (see `config.keys.Keys`).
        run_dir: folder of the run; it continues from its newest valid checkpoint.

    Raises:
        ConfigError: the configuration does not work.
        NonFiniteLoss: a loss was not finite.
        RunFailed: no checkpoint can be continued from, or the last one could not be saved.
    """
    with RunMirror(conf, run_dir) as mirror:
        code = _train(conf, run_dir, mirror)
        # the process group has ended: no other rank waits for this one
        mirror.finish(code)
    return code


def _train(conf: Conf, run_dir: str, mirror: RunMirror) -> ExitCode:
    heartbeat.current().beat(Phase.START)
    log.set_up(Path(run_dir, LOGS), rank=env_int("RANK"))
    settings = conf["trainer"]
    with (
        stop_signals() as stop,
        process_group() as ranks,
        FolderWatch(run_dir) if ranks.is_main else contextlib.nullcontext() as watch,
        numerics(
            deterministic=settings["deterministic"], float32_matmul=settings["float32_matmul"]
        ),
    ):
        checkpoints = open_store(conf["checkpoint"], run_dir)
        if not mirror.fetch(stop):
            return ExitCode.STOPPED
        strategy = build_strategy(settings)
        is_new = _is_new(conf, checkpoints)
        model = build_model(conf, ranks=ranks, strategy=strategy, is_new=is_new)
        start_iter, state = _resume_point(conf["resume"], checkpoints, model)
        parts = build_parts(
            conf,
            model=model,
            strategy=strategy,
            ranks=ranks,
            run_dir=run_dir,
            checkpoints=checkpoints,
            largest_forward=largest_forward(state, conf),
        )
        trainer, max_iter = parts.trainer, parts.conf["trainer"]["max_iter"]
        mirror.start()
        if why := why_done(start_iter, state, parts.conf["trainer"]):
            log.logger.info("%s %s", run_dir, why)
            return ExitCode.FINISHED
        stop.forward_to(trainer)
        if state:
            load_state(trainer, state, parts.schedule)
            _log_resume(start_iter, state, ranks)
        _note_epoch(trainer, settings, run_dir)
        _seed(conf["seed"], state, ranks)
        del state
        with _frozen_garbage(), _closing(parts.loader):
            # with fewer iterations than are done only the end is left
            trainer.train(start_iter, settings["max_iter"] if max_iter > start_iter else start_iter)
    # after the process group has ended: a rank that raises inside leaves the others waiting
    outcome = outcome_of(trainer)
    if watch is not None:
        watch.refuse_if_gone()
        may_be_unsaved = conf["hooks"].get("checkpoint") is None
        conclude(trainer, outcome, run_dir, checkpoints, may_be_unsaved=may_be_unsaved)
    return outcome


@contextlib.contextmanager
def _frozen_garbage() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # a full collection over all of torch's objects takes 0.1 s
    try:
        yield
    finally:
        gc.unfreeze()


def _closing(loader: Any) -> contextlib.AbstractContextManager[Any]:
    return contextlib.closing(loader) if isinstance(loader, Loader) else contextlib.nullcontext()


def _never_resumes(resume: str) -> bool:
    return resume == "never" and restart_count() == 0


def _is_new(conf: Conf, checkpoints: CheckpointStore) -> bool:
    """Whether the run starts from its initial weights; only asked where it has some to load."""
    if not conf["init"].get("weights"):
        return False
    return _never_resumes(conf["resume"]) or not has_checkpoints(checkpoints.folder)


def _resume_point(
    resume: str, checkpoints: CheckpointStore, model: nn.Module
) -> tuple[int, Conf | None]:
    """Return the first iteration and the state to load, see `resume.resume_point`."""
    if _never_resumes(resume):
        return 0, None
    start_iter, state = resume_point(checkpoints.folder, model)
    if state is None and resume == "must":
        expected = f"a checkpoint in {checkpoints.folder}; start with resume=auto"
        raise ConfigError(f"resume=must: expected {expected}")
    return start_iter, state


def _seed(seed: int, state: Conf | None, ranks: Topology) -> None:
    """Restore the random generators of this rank, or seed them for a new rank."""
    if state is None:
        seed_everything(seed, rank=ranks.rank)
    elif not restore_generators(state):
        seed_everything(seed + state["stream"]["iteration"], rank=ranks.rank)


def _note_epoch(trainer: Trainer, settings: Conf, run_dir: str) -> None:
    if trainer.where.is_main and isinstance(settings["max_iter"], str):
        assert trainer.iters_per_epoch is not None
        write_epoch(run_dir, trainer.iters_per_epoch)


def _log_resume(start_iter: int, state: Conf, ranks: Topology) -> None:
    if ranks.is_main:
        before = len(state["rng"]["ranks"])
        change = "" if before == ranks.world_size else f" (before: {before})"
        log.logger.info(
            "continuing after iteration %d on %s%s",
            *(start_iter, counted(ranks.world_size, "rank"), change),
        )

"""What every rank does, from the resolved configuration to the exit code."""

from __future__ import annotations

import contextlib
import gc
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from distrain import heartbeat, log
from distrain.checkpoint.store import CheckpointStore
from distrain.config.compose import build
from distrain.config.instantiate import with_key
from distrain.data.loader import EvalLoader, TrainLoader, micro_batches
from distrain.distributed.ranks import Topology, local_device, process_group
from distrain.distributed.rng import restore_random_states, seed_everything
from distrain.distributed.strategy import Strategy
from distrain.distributed.sync_batchnorm import convert_sync_batchnorm
from distrain.errors import ConfigError, ExitCode
from distrain.heartbeat import Phase
from distrain.job.outcome import conclude, outcome_of, why_done
from distrain.job.resume import resume_point
from distrain.job.same_data import check_same_data, open_files
from distrain.job.strategy import STRATEGY_KEYS, build_strategy
from distrain.optim.optimizer import build_optimizer
from distrain.process.environment import env_int, restart_count
from distrain.run_layout import CHECKPOINTS, LOGS
from distrain.runfolder.watch import FolderWatch
from distrain.schedule.schedules import WarmupConstantLR
from distrain.trainer.hook import HookBase
from distrain.trainer.numerics import numerics
from distrain.trainer.trainer import Trainer
from distrain.weights.load import start_from

Conf = dict[str, Any]

_OF_NUMERICS = ("deterministic", "float32_matmul")
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2)


def train(conf: Conf, run_dir: str) -> ExitCode:
    """Train as one rank; return FINISHED, or STOPPED with a checkpoint saved.

    Args:
        conf: resolved configuration (see `schema.Keys`).
        run_dir: folder of the run; it continues from its newest valid checkpoint.

    Raises:
        ConfigError: the configuration does not work.
        NonFiniteLoss: a loss was not finite.
        RunFailed: no checkpoint can be continued from, or the last one could not be saved.
    """
    heartbeat.current().beat(Phase.START)
    log.set_up(Path(run_dir, LOGS), rank=env_int("RANK"))
    exactness = {key: conf["trainer"][key] for key in _OF_NUMERICS}
    with (
        _listening() as stop,
        process_group() as where,
        _watching(where, run_dir) as watch,
        numerics(**exactness),
    ):
        checkpoints = CheckpointStore(
            Path(run_dir, CHECKPOINTS), attempt=restart_count(), **conf["checkpoint"]
        )
        strategy = build_strategy(conf["trainer"])
        model = build_model(conf, where=where, strategy=strategy)
        start_iter, state = _resume_point(conf["resume"], checkpoints, model)
        if why := why_done(start_iter, state, conf["trainer"]):
            log.logger.info("%s %s", run_dir, why)
            return ExitCode.FINISHED
        max_iter = max(conf["trainer"]["max_iter"], start_iter)  # less: only the end is left
        parts = build_parts(
            conf,
            where=where,
            run_dir=run_dir,
            checkpoints=checkpoints,
            strategy=strategy,
            model=model,
            state=state,
        )
        trainer = parts.trainer
        stop.trainer = trainer
        if stop.requested:
            trainer.request_stop()
        if state:
            trainer.load_state_dict(state)
            _log_resume(start_iter, state, where)
        _seed(conf["seed"], state, where)
        del state
        gc.collect()
        gc.freeze()  # a full collection over all of torch's objects takes 0.1 s
        try:
            trainer.train(start_iter, max_iter)
        finally:
            gc.unfreeze()
            parts.train_loader.close()
    # after the process group has ended: a rank that raises inside leaves the others waiting
    outcome = outcome_of(trainer)
    if watch is not None:
        watch.refuse_if_gone()
        may_be_unsaved = conf["hooks"].get("checkpoint") is None
        conclude(trainer, outcome, run_dir, checkpoints, may_be_unsaved=may_be_unsaved)
    return outcome


@dataclass(frozen=True)
class Parts:
    """What a configuration builds."""

    trainer: Trainer
    train_loader: TrainLoader
    schedule: Any


def build_parts(
    conf: Conf,
    *,
    where: Topology,
    run_dir: str,
    checkpoints: CheckpointStore,
    strategy: Strategy,
    model: nn.Module | None = None,
    state: Conf | None = None,
) -> Parts:
    """Build what a configuration names, in the order model, optimizer, schedule, data, hooks.

    Hooks may ask for `eval_loader`, `schedule`, `checkpoints`, `run_dir` or `conf` by naming it as
    a keyword.

    Args:
        conf: resolved configuration.
        where: the place of this process among the ranks.
        run_dir: folder of the run.
        checkpoints: of the run.
        strategy: as `build_strategy` has built it.
        model: as `build_model` has built it; None builds it.
        state: of the checkpoint that is resumed: a forward gets no more samples than it did there.

    Raises:
        ConfigError: a part cannot be built; names its key.
    """
    settings = dict(conf["trainer"])
    for other in ("max_iter", "sync_batchnorm", *_OF_NUMERICS, *STRATEGY_KEYS):
        del settings[other]
    if model is None:
        model = build_model(conf, where=where, strategy=strategy)
    if state is None and conf.get("init", {}).get("weights"):
        start_from(model, **conf["init"])
    optimizer, schedule = _optimization(conf, model)
    data = conf["data"]
    data_ranks = strategy.data_ranks(where)
    settings["accumulation"] = micro_batches(
        data["batch_size"],
        ranks=data_ranks.world_size,
        accumulation=settings["accumulation"],
        largest=state["stream"]["samples_per_forward"] if state else None,
    )
    datasets = _build_datasets(conf, where)
    train_loader = TrainLoader(
        datasets["data.train"],
        batch_size=data["batch_size"],
        rank=data_ranks.rank,
        world_size=data_ranks.world_size,
        accumulation=settings["accumulation"],
        seed=conf["seed"],
        workers=data["workers"],
        seed_samples=data["seed_samples"],
        pin_memory=local_device().type == "cuda",
    )
    hooks = _build_hooks(
        eval_loader=_eval_loader(datasets.get("data.eval"), conf, data_ranks),
        schedule=schedule,
        checkpoints=checkpoints,
        run_dir=run_dir,
        conf=conf,
    )
    trainer = Trainer(model, optimizer, train_loader, hooks=hooks, strategy=strategy, **settings)
    return Parts(trainer, train_loader, schedule)


def build_model(conf: Conf, *, where: Topology, strategy: Strategy) -> nn.Module:
    """Build the model on this rank's device, with the same initial weights on all ranks.

    Args:
        conf: resolved configuration.
        where: the place of this process among the ranks.
        strategy: a sharded model stays on the CPU: it goes to the device in shards.

    Raises:
        ConfigError: it is not a module.
    """
    seed_everything(conf["seed"], rank=0)
    model = build(conf["model"], "model")
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model._target_={conf['model']['_target_']}: it built a {type(model).__name__}, not "
            "a torch.nn.Module"
        )
    if conf["trainer"]["sync_batchnorm"] and where.world_size > 1:
        model = convert_sync_batchnorm(model)
    return model if strategy.is_sharded else model.to(local_device())


def _optimization(conf: Conf, model: nn.Module) -> tuple[Optimizer, Any]:
    """Return the optimizer and the schedule that are configured, or without optim the model's."""
    own = None
    if conf["optim"] is not None:
        try:
            optimizer = build_optimizer(model, **conf["optim"])
        except ConfigError as error:
            raise ConfigError(with_key(str(error), "optim", conf["optim"])) from error
    elif callable(configure := getattr(model, "configure_optimizers", None)):
        optimizer, own = configure()
    else:
        raise ConfigError(
            f"optim=null: {type(model).__name__} has no configure_optimizers; choose an "
            "optimizer, as optim=adamw"
        )
    if conf["schedule"] is None:
        return optimizer, own or WarmupConstantLR(optimizer, warmup_iters=0)
    if own is not None:
        raise ConfigError(
            "optim=null: the model brings a schedule of its own; add {override /schedule: null} to "
            "the defaults of the experiment"
        )
    return optimizer, build(conf["schedule"], "schedule", optimizer=optimizer)


def _build_datasets(conf: Conf, where: Topology) -> dict[str, Any]:
    """Build the data sets, by their keys, and check that they are the same on all ranks."""
    data = conf["data"]
    open_before = open_files()
    names = [name for name in ("train", "eval") if data[name] is not None]
    datasets = {f"data.{name}": build(data[name], f"data.{name}") for name in names}
    if where.world_size > 1:
        # where CUDA is in use, fork only if loader processes are forked anyway
        may_fork = data["workers"] > 0 or not torch.cuda.is_initialized()
        check_same_data(datasets, seed=conf["seed"], open_before=open_before, may_fork=may_fork)
    return datasets


def _eval_loader(dataset: Any, conf: Conf, where: Topology) -> EvalLoader | None:
    if dataset is None:
        return None
    data = conf["data"]
    batch_size = data["eval_batch_size"] or data["batch_size"]
    return EvalLoader(
        dataset,
        batch_size=max(1, batch_size // where.world_size),
        rank=where.rank,
        world_size=where.world_size,
        workers=data["workers"],
        seed=conf["seed"],
        seed_samples=data["seed_samples"],
    )


def _build_hooks(**context: Any) -> dict[str, HookBase]:
    hooks: dict[str, HookBase] = {}
    for name, node in context["conf"]["hooks"].items():
        if node is None:
            continue
        hooks[name] = build(node, f"hooks.{name}", **context)
        if not isinstance(hooks[name], HookBase):
            raise ConfigError(
                f"hooks.{name}._target_={node['_target_']}: not a HookBase; derive your hook from "
                "distrain.HookBase"
            )
    return hooks


def _resume_point(
    resume: str, checkpoints: CheckpointStore, model: nn.Module
) -> tuple[int, Conf | None]:
    """Return the first iteration and the state, see `resume.resume_point`."""
    if resume == "never" and restart_count() == 0:
        return 0, None
    start_iter, state = resume_point(checkpoints.folder, model)
    if state is None and resume == "must":
        expected = f"a checkpoint in {checkpoints.folder}; start with resume=auto"
        raise ConfigError(f"resume=must: expected {expected}")
    return start_iter, state


def _seed(seed: int, state: Conf | None, where: Topology) -> None:
    """Put the random generators of this rank where they were, or where a new rank starts."""
    ranks = state["rng"]["ranks"] if state else []
    if state and len(ranks) == where.world_size:
        restore_random_states(ranks[where.rank])
    elif state:  # another number of ranks: nobody's generators fit
        seed_everything(seed + state["stream"]["iteration"], rank=where.rank)
    else:
        seed_everything(seed, rank=where.rank)


def _log_resume(start_iter: int, state: Conf, where: Topology) -> None:
    if not where.is_main:
        return
    before = len(state["rng"]["ranks"])
    ranks = "" if before == where.world_size else f", then on {before} ranks"
    log.logger.info(
        "continuing after iteration %d on %d ranks%s", start_iter, where.world_size, ranks
    )


def _watching(where: Topology, run_dir: str) -> AbstractContextManager[FolderWatch | None]:
    """Return the watch of the run's folder, on rank 0."""
    return FolderWatch(run_dir) if where.is_main else contextlib.nullcontext()


class _Stop:
    """Whether a signal asked to stop, and whom to tell."""

    requested = False
    trainer: Trainer | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if self.trainer is not None:
            self.trainer.request_stop()


@contextlib.contextmanager
def _listening() -> Iterator[_Stop]:
    """Take stop signals as requests: the ranks agree on an iteration, save there and leave.

    A SIGHUP that is ignored already stays so: nohup, or the rank's agent, has said so. What the
    command was asked before counts.
    """
    stop = _Stop()
    before = {}
    for number in _STOP_SIGNALS:
        if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            continue
        outer = before[number] = signal.signal(number, stop)
        stop.requested |= getattr(outer, "since", None) is not None
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

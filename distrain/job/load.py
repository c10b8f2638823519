"""Load the model of a run: for evaluation, for a notebook."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from distrain.checkpoint.catalog import Found, describe, find_all, newest_valid
from distrain.checkpoint.format import iteration_of
from distrain.checkpoint.retention import read_best
from distrain.checks import wrong
from distrain.config.check_keys import check
from distrain.distributed.ranks import topology
from distrain.distributed.strategy import Strategy
from distrain.errors import ConfigError
from distrain.job.model import build_model
from distrain.redact import MASK
from distrain.run_layout import CHECKPOINTS, CONFIG_FILE
from distrain.runfolder.differences import covers, flat
from distrain.runfolder.files import read_frozen
from distrain.trainer.module_state import kept_generators
from distrain.weights.read import read_model


def load(run: str | Path, *, checkpoint: str | int = "newest", ema: str | None = None) -> nn.Module:
    """Return the model of a run in eval mode, on the CPU, with the weights of a checkpoint.

    The model is built from the run's `run.yaml`; modules that its `_target_` names must be
    importable. The random generators of this process are left alone.

    Args:
        run: folder of the run.
        checkpoint: "newest" valid one, "best" by its only metric, "best:METRIC", or an iteration.
        ema: name of an EMA hook of the run: its average instead of the weights.

    Raises:
        ConfigError: there is no such run or checkpoint, or the weights do not fit.
    """
    conf = read_conf(run)
    other = "build the model yourself, and give it the weights of python -m distrain.weights"
    refuse_masked(conf, ("model", "transforms"), expected=other)
    found = find_checkpoint(run, checkpoint)
    with kept_generators():  # building the model seeds all of them
        model = model_of(conf, found.path, ema=ema)
    return model.cpu().eval()


def read_conf(run: str | Path) -> dict[str, Any]:
    """Return the resolved configuration of a run.

    Raises:
        ConfigError: the folder holds no run.
    """
    frozen = read_frozen(Path(run, CONFIG_FILE))
    if frozen is None:
        raise ConfigError(f"{run}: expected the folder of a run, with a {CONFIG_FILE}")
    return check(frozen)


def refuse_masked(conf: Mapping[str, Any], nodes: Sequence[str], *, expected: str = "") -> None:
    """Raise ConfigError for a value below `nodes` that `run.yaml` holds as `***` only.

    Args:
        conf: of the run.
        nodes: dotted keys.
        expected: advice for the user; "": to give the key again.
    """
    for key, value in flat(conf).items():
        if covers(nodes, key) and (value == MASK or f"://{MASK}@" in str(value)):
            fix = expected or f"give it again with {key}=..."
            raise ConfigError(f"{key}={value}: run.yaml does not hold this secret; {fix}")


def find_checkpoint(run: str | Path, which: str | int) -> Found:
    """Return the valid checkpoint that `checkpoint=WHICH` names; see `load`.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    folder, name = Path(run, CHECKPOINTS), str(which)
    if name == "newest":
        found = newest_valid(folder)
        if found is None:
            raise ConfigError(f"{folder}: no valid checkpoint")
        return found
    if name == "best" or name.startswith("best:"):
        iteration = _best(folder, name.partition(":")[2])
    elif name.isdecimal():
        iteration = int(name)
    else:
        raise wrong("checkpoint", which, "newest, best, best:METRIC or an iteration")
    paths = {iteration_of(path.name): path for path in find_all(folder)}
    if iteration not in paths:
        available = ", ".join(map(str, paths)) or "none"
        raise ConfigError(f"checkpoint={which}: not in {folder}; available: {available}")
    found = describe(paths[iteration])
    if not found.valid:
        raise ConfigError(f"checkpoint={which}: damaged: {found.why_not}")
    return found


def _best(folder: Path, metric: str) -> int:
    """Return the iteration of the best checkpoint by a metric; "" is the only metric."""
    best: Mapping[str, Mapping[str, Any]] = read_best(os.fspath(folder))
    if metric in best:
        return int(best[metric]["iteration"])
    if not metric and len(best) == 1:
        return int(next(iter(best.values()))["iteration"])
    available = ", ".join(f"best:{name}" for name in best)
    raise ConfigError(
        f"checkpoint=best{':' * bool(metric)}{metric}: "
        + (f"available: {available}" if best else "no hook of the run kept the best checkpoint")
    )


def model_of(conf: dict[str, Any], checkpoint: Path, *, ema: str | None = None) -> nn.Module:
    """Return the model of a configuration with the weights of a checkpoint, on this rank's device.

    Raises:
        ConfigError: the model cannot be built, or the weights do not fit.
    """
    model = build_model(conf, ranks=topology(), strategy=Strategy(), is_new=False)
    state = read_model(checkpoint, ema=ema)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # one line per tensor that does not fit
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        raise ConfigError(f"{checkpoint} does not fit the model: {' '.join(lines)}") from error
    return model

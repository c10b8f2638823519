"""Sweeps: folder names of their runs, their objectives, and the exit code."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from distrain.errors import ConfigError, ExitCode, RunFailed
from distrain.redact import masked_overrides
from distrain.runfolder.objective import objective

_MAX_NAME = 120  # characters; file systems allow 255 bytes
_SEVERITY = (ExitCode.FINISHED, ExitCode.STOPPED, ExitCode.BAD_CONFIG, ExitCode.FAILED)


def sweep_name(hydra_conf: Any, argv: Sequence[str]) -> str:
    """Return the folder name of a run in its sweep, "" without a sweep.

    Example: `-m +experiment=digits optim.lr=0.1,0.2` gives `optim.lr=0.1` and `optim.lr=0.2`.
    """
    if not _is_sweep(hydra_conf):
        return ""
    fixed = {key for each in argv if (key := _fixed_key(each))}
    overrides = [each.lstrip("+~") for each in hydra_conf.overrides.task]
    swept = [each for each in overrides if each.partition("=")[0] not in fixed]
    named = [each for each in swept if not each.startswith("run.")]
    return folder_name(",".join(named), shown=",".join(masked_overrides(named)))


def folder_name(text: str, *, shown: str | None = None) -> str:
    """Return a text as a folder name of letters, digits and `._=,+-`.

    A changed name ends in a hash of the text: "a/b=1" gives "a_b=1-5d0c5a". `shown` is the text
    with its secrets masked.
    """
    name = re.sub(r"[^A-Za-z0-9._=,+-]", "_", text if shown is None else shown)
    name = name[:_MAX_NAME].lstrip(".-")
    if name == text:
        return name
    return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def swept_values(argv: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return the arguments with one value, and the overrides of each key with several.

    Example: `+experiment=x lr=0.1,0.2` gives `["+experiment=x"]` and `[["lr=0.1", "lr=0.2"]]`.

    Raises:
        ConfigError: an argument cannot be read, or is an interval, which has no list of values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    fixed: list[str] = []
    swept: list[list[str]] = []
    for argument in argv:
        if argument.startswith("-") or "=" not in argument or _fixed_key(argument):
            fixed.append(argument)
            continue
        try:
            override = OverridesParser.create().parse_override(argument)
            key = override.get_key_element()
            swept.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        except HydraException as error:
            raise ConfigError(f"{argument}: expected a list of values: {error}") from error
    return fixed, swept


def check_objective(conf: Mapping[str, Any], hydra_conf: Any, *, waits: bool) -> None:
    """Raise ConfigError if a sweep cannot optimize `sweep.metric`.

    Args:
        conf: of a run.
        hydra_conf: Hydra's own configuration.
        waits: whether the launcher waits for the end of a run.
    """
    direction = hydra_conf.sweeper.get("direction")
    metric, mode = conf["sweep"]["metric"], conf["sweep"]["mode"]
    if not _is_sweep(hydra_conf):
        return
    if direction is not None and metric is None:
        sweeper = hydra_conf.sweeper["_target_"]
        expected = f"the scalar that {sweeper} optimizes, as eval/accuracy"
        raise ConfigError(f"sweep.metric: expected {expected}")
    if metric is None:
        return
    if not waits:
        expected = "launch=local: this launcher does not wait for the run whose value is wanted"
        raise ConfigError(f"sweep.metric={metric}: expected {expected}")
    direction = str(direction).rpartition(".")[2]  # an Enum of the sweeper, or its text
    if direction not in ("None", f"{mode}imize"):
        expected = f"{mode}imize, as sweep.mode={mode}"
        raise ConfigError(f"hydra.sweeper.direction={direction}: expected {expected}")


def objective_of(job: Any, code: ExitCode) -> float | None:
    """Return the best value of `sweep.metric` of a run in a sweep, None where it is not set.

    Args:
        job: the `TrainJob` of the run; None if it could not be composed.
        code: its exit code.

    Raises:
        RunFailed: it did not finish, or has no finite value: a sweeper counts it as failed.
    """
    from hydra.core.hydra_config import HydraConfig

    if job is None or job.conf["sweep"]["metric"] is None or not _is_sweep(HydraConfig.get()):
        return None
    metric, mode = job.conf["sweep"]["metric"], job.conf["sweep"]["mode"]
    if code == ExitCode.FINISHED:
        value = objective(job.run_dir, metric, mode=mode)
        if value is not None:
            return value
    raise RunFailed(f"{job.run_dir}: no value of {metric}: the sweeper counts it as failed")


def _is_sweep(hydra_conf: Any) -> bool:
    from hydra.types import RunMode

    return bool(hydra_conf.mode == RunMode.MULTIRUN)


def worst(codes: Sequence[ExitCode]) -> ExitCode:
    """Return the most severe exit code of several runs; FINISHED for none."""
    return max(codes, key=_SEVERITY.index, default=ExitCode.FINISHED)


def _fixed_key(argument: str) -> str:
    """Return the key of an argument such as `a.b=1`; "" for `a.b=1,2` and others."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if argument.startswith("-") or "=" not in argument:
        return ""
    try:
        override = OverridesParser.create().parse_override(argument)
    except HydraException:
        return ""
    return "" if override.is_sweep_override() else override.get_key_element().lstrip("+~")

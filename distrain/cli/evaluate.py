"""`python -m distrain.evaluate`: evaluate a checkpoint of a run, write its predictions."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distrain.config.import_path import import_from_here
from distrain.errors import (
    ConfigError,
    ExitCode,
    RankFailed,
    RunFailed,
    StoppedBeforeStart,
    exit_code,
)
from distrain.launch.options import import_torch

_CONF = Path(__file__).parents[1] / "conf"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distrain.evaluate",
        description="Evaluate a checkpoint of a run on data.eval, with any number of ranks.",
        epilog="Exit status: 0 evaluated, 1 failed, 2 bad configuration, 75 stopped.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run, as runs/digits")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="checkpoint=newest|best|best:METRIC|ITERATION (default: newest); any key of the "
        "configuration, as data.eval.split=test or launch.ranks=4; launch=local|slurm",
    )
    parser.add_argument(
        "--set", metavar="NAME", help="evaluate this set of data.eval only, where it has several"
    )
    parser.add_argument("--ema", metavar="NAME", help="evaluate the average of this EMA hook")
    parser.add_argument(
        "--predict", metavar="FILE", help="write model.predict(batch) to FILE.jsonl or .safetensors"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the evaluation of a command line; return the exit code."""
    options = build_parser().parse_intermixed_args(arguments)  # KEY=VALUE anywhere
    import_from_here()
    try:
        return int(run(options))
    except (ConfigError, RankFailed, RunFailed, OSError) as error:
        print(f"distrain.evaluate: {error}", file=sys.stderr)
        return int(exit_code(error))


def run(options: argparse.Namespace) -> ExitCode:
    """Start the evaluation with the run's launcher and print the metrics."""
    import_torch()
    from distrain.config.instantiate import build
    from distrain.job.eval_sets import eval_nodes, only_set
    from distrain.job.evaluation import RESULT_FILE, EvaluateJob
    from distrain.job.load import find_checkpoint, read_conf, refuse_masked
    from distrain.job.predictions import check_output

    which, conf = changed(read_conf(options.run), options.overrides)
    if options.set is not None:
        conf = only_set(conf, options.set)
    refuse_masked(conf, ("model", "transforms", "data.eval", "data.collate", "eval"))
    sets = [*eval_nodes(conf)]
    if not sets:
        raise ConfigError("data.eval: expected a value, the _target_ of a data set")
    if options.predict is not None and len(sets) > 1:
        raise ConfigError(f"--predict: expected one data set; add --set {' or --set '.join(sets)}")
    found = find_checkpoint(options.run, which)
    if options.predict is not None:
        check_output(options.predict)
    folder = _new_folder(options.run / "evaluations", found.path.name)
    job = EvaluateJob(
        conf,
        str(folder.absolute()),
        str(found.path.absolute()),
        options.ema,
        None if options.predict is None else os.path.abspath(options.predict),
    )
    conf["launch"].pop("nice", None)  # an evaluation has no state to save: it cannot step aside
    try:
        code = ExitCode(build(conf["launch"], "launch").start(job))
    except (ConfigError, StoppedBeforeStart):
        with contextlib.suppress(OSError):  # it holds the logs of ranks that failed
            folder.rmdir()
        raise
    result = folder / RESULT_FILE
    if code == ExitCode.FINISHED and result.exists():  # a submitted job writes it later
        print(f"{options.run}, iteration {found.iteration}")
        for name, value in json.loads(result.read_text())["metrics"].items():
            print(f"  {name:<20} {value:.6g}")
    are = "are" if result.exists() else "will be"
    print(f"distrain.evaluate: results {are} in {folder}", file=sys.stderr)
    return code


def changed(conf: dict[str, Any], overrides: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the checkpoint asked for, and the configuration with the overrides.

    Raises:
        ConfigError: an override has no value, or its key does not exist.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from distrain.config.check_keys import check
    from distrain.config.compose import explain

    which, composed = "newest", OmegaConf.create(conf)
    # the group first, as in training: its file must not replace keys that were given before it
    for override in sorted(overrides, key=lambda each: not each.startswith("launch=")):
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override}: expected KEY=VALUE")
        if key == "checkpoint":
            which = value
        elif key == "launch":
            composed.launch = _launch_group(value)
        else:
            key = key.lstrip("+")
            try:
                OmegaConf.update(composed, key, _value(override), force_add=True)
            except (OmegaConfBaseException, ValueError) as error:
                raise explain(error) from error
    try:
        plain = OmegaConf.to_container(composed, resolve=True)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(plain, dict)
    return which, check({str(key): value for key, value in plain.items()})


def _value(override: str) -> Any:
    """Return the value of KEY=VALUE in the grammar of training: `no` and `1:30` are text."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    from distrain.config.compose import explain
    from distrain.config.overrides import readable

    try:
        (parsed,) = OverridesParser.create().parse_overrides(readable([override]))
    except HydraException as error:
        raise explain(error) from error
    if parsed.is_sweep_override() or parsed.is_delete():
        raise ConfigError(f"{override}: expected one value, KEY=VALUE")
    return parsed.value()


def _launch_group(choice: str) -> Any:
    """Return the node that `launch=CHOICE` stands for, with the options that launchers share."""
    from hydra import compose, initialize_config_module

    names = sorted(each.stem for each in (_CONF / "launch").glob("*.yaml"))
    if choice not in names:
        raise ConfigError(f"launch={choice}: no such choice; available: {', '.join(names)}")
    with initialize_config_module("distrain.conf", version_base="1.3"):
        return compose(f"launch/{choice}").launch


def _new_folder(above: Path, name: str) -> Path:
    """Create and return the next folder `name`, `name-2`, ..."""
    number = 1
    while True:
        folder = above / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder

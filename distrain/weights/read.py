"""A model's weights without the rest of a run: read from anywhere, written for inference.

`python -m distrain.weights RUN -o FILE` makes one safetensors file of a run's newest checkpoint.
torch is imported by what needs it, so that mistakes cost a moment only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.checkpoint import format as fmt
from distrain.checkpoint.catalog import find_all, newest_valid
from distrain.errors import ConfigError
from distrain.files.atomic import replacing
from distrain.files.regular import open_regular
from distrain.files.retry import retried
from distrain.run_layout import CHECKPOINTS

if TYPE_CHECKING:
    from torch import Tensor

_WRAPPED = ("state_dict", "model", "model_state_dict", "module")  # Lightning, timm and others


def locate_weights(path: str | Path) -> Path:
    """Return the file, or the folder of the checkpoint, that a path means.

    Args:
        path: a run's folder or its folder of checkpoints, for the newest valid one; the folder of a
            checkpoint; or a file.

    Raises:
        ConfigError: there is nothing, or no valid checkpoint in the folder.
    """
    path = Path(path)
    if path.is_file() or (path / fmt.MANIFEST_FILE).exists():
        return path
    if not path.exists():
        raise ConfigError(
            f"{path}: there is no such file or folder; give a run's folder, one of its "
            "checkpoints, *.safetensors or *.pt"
        )
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if not find_all(folder, with_trained=True):
        raise ConfigError(f"{path}: this folder holds no checkpoint; give that of a run")
    found = newest_valid(folder)
    if found is None:
        raise ConfigError(f"{path}: none of its checkpoints is valid; give another run's folder")
    return found.path


def read_weights(path: str | Path, *, ema: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a model by name, on the CPU. Nothing in the file is executed.

    Args:
        path: the folder of a checkpoint; a safetensors file; or what `torch.save` made of a state
            dict, or of a dict that has it as "state_dict" or "model".
        ema: the name of an EMA hook of the run: its average takes the place of the weights.

    Raises:
        ConfigError: it holds no weights that can be read, or has no such average.
        OSError: it cannot be opened, after retries, or is no regular file.
    """
    path = Path(path)
    if path.is_dir():
        return _of_checkpoint(path, ema)
    if ema is not None:
        raise ConfigError(f"{path}: only a run's checkpoint has an average, ema={ema}")
    # the libraries report what cannot be opened as missing or as damaged
    os.close(retried(lambda: open_regular(path)))
    return _of_safetensors(path) if path.suffix == ".safetensors" else _of_torch(path)


def _of_checkpoint(path: Path, ema: str | None) -> dict[str, Tensor]:
    from distrain.checkpoint.decode import load_checkpoint

    try:
        state = load_checkpoint(path)
    except fmt.CheckpointDamaged as error:
        raise ConfigError(f"{error}; give another checkpoint") from error
    weights = dict(state[fmt.MODEL_PART])
    if ema is not None:
        hooks: Mapping[str, Any] = state.get("hooks", {})
        averages = {n: s["average"] for n, s in hooks.items() if s and s.get("average")}
        if ema not in averages:
            there = ", ".join(averages) or "none"
            raise ConfigError(f"{path}: it holds no average called ema={ema}; available: {there}")
        weights |= averages[ema]
    return _tensors(weights)


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: not a safetensors file: {error}") from error


def _of_torch(path: Path) -> dict[str, Tensor]:
    import pickle

    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigError(
            f"{path}: not a file of tensors, or one with objects beside them, which would run "
            "code; save model.state_dict() with torch.save"
        ) from error
    except Exception as error:  # zip files, pickles and tensors all fail in ways of their own
        raise ConfigError(f"{path}: torch.load cannot read it: {error!s:.200}") from error
    if isinstance(found, Mapping):
        for node in (found, *(found[key] for key in _WRAPPED if key in found)):
            if isinstance(node, Mapping) and (tensors := _tensors(node)):
                return tensors
    what = f"a dict of {', '.join(map(str, found))}" if isinstance(found, dict) else type(found)
    raise ConfigError(f"{path}: it holds {what!s:.200}, not a state dict")


def _tensors(node: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Return the tensors among the values by name."""
    from torch import Tensor

    return {str(name): value for name, value in node.items() if isinstance(value, Tensor)}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m distrain.weights",
        description="Write the weights of a run's checkpoint into one safetensors file.",
        epilog="Exit status: 0 written, 2 not.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run's folder (its newest valid checkpoint), or a checkpoint's"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--ema", metavar="NAME", help="take the average of this EMA hook")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line asks for and return the exit status.

    Args:
        arguments: the command line, `sys.argv` if it is None.
    """
    options = build_parser().parse_args(arguments)
    output: Path = options.output
    try:
        if output.exists():
            raise ConfigError(f"{output} is there already; give another name")
        source = locate_weights(options.run)
        weights = read_weights(source, ema=options.ema)
        _write(output, weights)
    except (ConfigError, OSError) as error:
        print(f"distrain: {error}", file=sys.stderr)
        return 2
    average = "" if options.ema is None else f", the average {options.ema}"
    num_bytes = sum(t.numel() * t.itemsize for t in weights.values())
    print(f"{output}: {len(weights)} tensors, {num_bytes / 1e6:.1f} MB, of {source}{average}")
    return 0


def _write(output: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # readers of other libraries look for this key, and want tensors without gaps
    plain = {name: tensor.contiguous() for name, tensor in weights.items()}
    try:
        with replacing(output) as scratch:
            save_file(plain, scratch, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ConfigError(f"{output}: it cannot be written: {error}") from error

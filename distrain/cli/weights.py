"""`python -m distrain.weights`: write the weights of a run into one safetensors file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distrain.errors import ConfigError
from distrain.files.atomic import replacing
from distrain.weights.read import locate_weights, read_weights

if TYPE_CHECKING:
    from torch import Tensor

_SUFFIX = ".safetensors"


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser."""
    parser = argparse.ArgumentParser(
        prog="python -m distrain.weights",
        description="Write the weights of a run's checkpoint into one safetensors file.",
        epilog="Exit status: 0 written, 2 failed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "run",
        metavar="RUN",
        help="a run folder (its newest valid checkpoint), or a checkpoint folder",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--ema", metavar="NAME", help="take the average of this EMA hook")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    options = build_parser().parse_args(arguments)
    output: Path = options.output
    try:
        if output.suffix != _SUFFIX:  # by which readers know the format
            raise ConfigError(f"-o {output}: expected a name that ends with {_SUFFIX}")
        if output.exists():
            raise ConfigError(f"{output} exists; give another name")
        source = locate_weights(options.run)
        weights = read_weights(source, ema=options.ema)
        _write(output, weights)
    except (ConfigError, OSError) as error:
        print(f"distrain: {error}", file=sys.stderr)
        return 2
    average = "" if options.ema is None else f", the average {options.ema}"
    num_bytes = sum(t.numel() * t.itemsize for t in weights.values())
    print(f"{output}: {len(weights)} tensors, {num_bytes / 1e6:.1f} MB, from {source}{average}")
    return 0


def _write(output: Path, weights: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain: dict[str, Tensor] = {}
    memory: set[int] = set()
    try:
        for name, tensor in weights.items():
            # other libraries require contiguous tensors; tied ones of a file share their memory
            whole = tensor.contiguous()
            place = whole.untyped_storage().data_ptr()
            plain[name] = whole.clone() if place in memory else whole
            memory.add(place)
        with replacing(output) as scratch:
            save_file(plain, scratch, metadata={"format": "pt"})  # others require this key
    except KeyError as error:  # a dtype that it does not know
        raise ConfigError(f"{output}: a safetensors file cannot hold {error}") from error
    except (SafetensorError, RuntimeError) as error:  # also of sparse tensors, and without values
        text = " ".join(str(error).split())
        raise ConfigError(f"{output}: cannot be written: {text}") from error

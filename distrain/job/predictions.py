"""Write the predictions of a model for a data set: each sample once, in order, from all ranks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distrain import progress
from distrain.checks import wrong
from distrain.data.loader import EvalLoader
from distrain.distributed.collectives import gather_to_all
from distrain.distributed.ranks import topology
from distrain.distributed.serialization import decode, encode
from distrain.errors import ConfigError
from distrain.files import atomic
from distrain.log import logger
from distrain.trainer.evaluate import evaluating, on_device
from distrain.trainer.model_call import call, takes_whole_batch
from distrain.trainer.numerics import Precision, autocast_dtype
from distrain.trainer.predictions import Predictions, join_ranks, named

KINDS = (".jsonl", ".safetensors")


def check_output(path: str) -> None:
    """Raise ConfigError unless the file for predictions has a known kind and can be written."""
    file = Path(path).absolute()
    if file.suffix not in KINDS:
        raise wrong("--predict", path, "a file name that ends with " + " or ".join(KINDS))
    if file.is_dir():
        raise wrong("--predict", path, "a file; it is a folder")
    if not os.access(file.parent, os.W_OK | os.X_OK):  # else known after all predictions only
        raise wrong("--predict", path, f"a file in a folder that can be written, not {file.parent}")


def write_predictions(
    model: nn.Module,
    loader: EvalLoader,
    path: str,
    *,
    device: torch.device,
    precision: Precision = "fp32",
    channels_last: bool = False,
) -> None:
    """Write what `model.predict(batch)` returns for each sample of all ranks. A collective.

    `predict` is called like forward and returns (B, ...) tensors, or lists of B values; see
    `predictions.named` for their names. A `.safetensors` file has (N, ...) tensors, a `.jsonl` file
    has one line per sample, with its index. A collate that leaves samples out, or makes several of
    one, is reported; the lines have no index then.

    Args:
        model: on its device, with its weights.
        loader: contiguous share of this rank.
        path: the file; replaced when all predictions are there.
        device: of the model.
        precision: "bf16" and "fp16" predict under autocast.
        channels_last: memory format of images.

    Raises:
        ConfigError: the model has no `predict`, or it does not return one value per sample.
    """
    predict = getattr(model, "predict", None)
    if predict is None:
        kind = type(model).__name__
        raise ConfigError(
            f"--predict: {kind} has no method predict; write one that takes a batch as forward "
            "does and returns (B, ...) tensors by name"
        )
    predictions = Predictions()
    whole, dtype = takes_whole_batch(model), autocast_dtype(precision)
    with evaluating(model):
        counted = progress.counted(loader, "predictions", total=len(loader))
        for batch, length in on_device(counted, device=device, channels_last=channels_last):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                found = call(predict, batch, whole=whole)
            predictions.add(named(found), length)
    try:
        part = encode(predictions.joined())
    except TypeError as error:
        raise ConfigError(f"--predict: expected tensors, numbers and text: {error}") from error
    ranks = topology()
    Path(f"{path}.rank_{ranks.rank}").write_bytes(part)
    gather_to_all(ranks.rank)  # all parts are written
    if ranks.is_main:
        files = [Path(f"{path}.rank_{rank}") for rank in range(ranks.world_size)]
        try:
            joined = join_ranks([decode(file.read_bytes()) for file in files])
            _write(joined, path, num_samples=loader.num_samples)
        finally:
            for file in files:
                file.unlink(missing_ok=True)


def _write(whole: Mapping[str, Any], path: str, *, num_samples: int) -> None:
    """Write the predictions of all ranks, for so many samples, as one file."""
    is_tensors = Path(path).suffix == ".safetensors"
    for name, value in whole.items():
        if is_tensors and not isinstance(value, Tensor):
            raise ConfigError(
                f"--predict={path}: {name!r} is a list, or differs in shape between samples; "
                "expected a .jsonl file for it"
            )
    num = len(next(iter(whole.values()), ()))
    if num != num_samples:
        logger.warning(
            "--predict=%s: %d predictions for %d samples, as data.collate leaves samples out or "
            "adds some: a place in the file is not the index of a sample; return the index from "
            "predict",
            *(path, num, num_samples),
        )
    with atomic.replacing(path) as scratch:
        if is_tensors:
            save_file({name: value.contiguous() for name, value in whole.items()}, scratch)
        else:
            with open(scratch, "w", encoding="utf-8") as file:
                file.writelines(_lines(whole, num, has_index=num == num_samples))


def _lines(whole: Mapping[str, Any], num: int, *, has_index: bool) -> Iterator[str]:
    for index in range(num):
        line = {"index": index} if has_index else {}
        line |= {name: _plain(value[index]) for name, value in whole.items()}
        yield json.dumps(line) + "\n"


def _plain(value: Any) -> Any:
    """Return a prediction as JSON values."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value

"""Write the predictions of a model for a data set: each sample once, in order, from all ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distrain import progress
from distrain.checks import wrong
from distrain.data.loader import EvalLoader
from distrain.distributed.collectives import gather_to_all
from distrain.distributed.ranks import topology
from distrain.errors import ConfigError
from distrain.files import atomic
from distrain.trainer.evaluate import evaluating, on_device
from distrain.trainer.model_call import call, takes_whole_batch
from distrain.trainer.numerics import Precision, autocast_dtype

KINDS = (".jsonl", ".safetensors")


def check_output(path: str) -> None:
    """Check the name of the file for predictions.

    Raises:
        ConfigError: it ends with neither .jsonl nor .safetensors.
    """
    if Path(path).suffix not in KINDS:
        raise wrong("--predict", path, "a file name that ends with " + " or ".join(KINDS))


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

    `predict` is called like forward and returns (B, ...) tensors by name, or one tensor. A
    `.safetensors` file has them as (N, ...), a `.jsonl` file has one line per sample.

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
    parts: dict[str, list[Tensor]] = {}
    whole, dtype = takes_whole_batch(model), autocast_dtype(precision)
    with evaluating(model):
        counted = progress.counted(loader, "predictions", total=len(loader))
        for batch, length in on_device(counted, device=device, channels_last=channels_last):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                found = call(predict, batch, whole=whole)
            for name, value in _named(found, length).items():
                parts.setdefault(name, []).append(value.cpu())
    own = {name: torch.cat(values).contiguous() for name, values in parts.items()}
    part = Path(f"{path}.rank_{topology().rank}")
    save_file(own, part)
    counts = gather_to_all(len(next(iter(own.values()))) if own else 0)  # all parts are written
    if topology().is_main:
        files = [Path(f"{path}.rank_{rank}") for rank in range(len(counts))]
        try:
            parts_of = zip(files, counts, strict=True)
            _join([load_file(file) for file, count in parts_of if count], path)
        finally:
            for file in files:
                file.unlink(missing_ok=True)


def _named(found: Any, length: int) -> dict[str, Tensor]:
    """Return predictions by name, checked to be (length, ...)."""
    named = found if isinstance(found, Mapping) else {"prediction": found}
    for name, value in named.items():
        if not isinstance(value, Tensor) or value.shape[:1] != (length,):
            shape = [*value.shape] if isinstance(value, Tensor) else type(value).__name__
            raise ConfigError(f"predict() returned {name!r}: {shape}; expected [{length}, ...]")
    return {str(name): value for name, value in named.items()}


def _join(parts: list[dict[str, Tensor]], path: str) -> None:
    """Write the predictions of all ranks, in order, as one file."""
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    with atomic.replacing(path) as scratch:
        if Path(path).suffix == ".safetensors":
            save_file(whole, scratch)
        else:
            with open(scratch, "w", encoding="utf-8") as file:
                file.writelines(_lines(whole))


def _lines(whole: Mapping[str, Tensor]) -> Iterator[str]:
    for index in range(len(next(iter(whole.values())))):
        values = {name: value[index].tolist() for name, value in whole.items()}
        yield json.dumps({"index": index, **values}) + "\n"

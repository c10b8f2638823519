"""Read model weights from a run, a checkpoint, a safetensors file or a file of torch.save.

Functions that need torch import it, so that mistakes are reported at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.checkpoint import format as fmt
from distrain.checkpoint.catalog import find_all, newest_valid
from distrain.errors import ConfigError
from distrain.files.open_regular import open_regular
from distrain.files.retry import retried
from distrain.run_layout import CHECKPOINTS

if TYPE_CHECKING:
    from torch import Tensor

_WRAPPED = ("state_dict", "model", "model_state_dict", "module")  # Lightning, timm and others


def locate_weights(path: str | Path) -> Path:
    """Return the path if it is a file or a checkpoint, else the newest valid checkpoint of a run.

    Raises:
        ConfigError: the path does not exist, or holds no valid checkpoint.
    """
    path = Path(path)
    if path.is_file() or (path / fmt.MANIFEST_FILE).exists():
        return path
    if not path.exists():
        raise ConfigError(
            f"{path}: there is no such file or folder; expected a run folder, one of its "
            "checkpoints, *.safetensors or *.pt"
        )
    folder = path / CHECKPOINTS
    folder = folder if folder.is_dir() else path
    if not find_all(folder, with_trained=True):
        raise ConfigError(f"{path}: this folder holds no checkpoint; give that of a run")
    found = newest_valid(folder)
    if found is None:
        raise ConfigError(f"{path}: none of its checkpoints is valid; give another run's folder")
    return found.path


def read_weights(path: str | Path, *, ema: str | None = None) -> dict[str, Tensor]:
    """Return the tensors of a model by name, on the CPU. No code in the file is executed.

    Args:
        path: the folder of a checkpoint; a safetensors file; or a file of `torch.save` with a state
            dict, or with a dict that has one as "state_dict" or "model".
        ema: name of an EMA hook of the run, whose average replaces the weights.

    Raises:
        ConfigError: it holds no readable weights, or no such average.
        OSError: it cannot be opened, after retries, or is not a regular file.
    """
    path = Path(path)
    if path.is_dir():
        return _tensors(read_model(path, ema=ema))
    if ema is not None:
        raise ConfigError(f"{path}: only a run's checkpoint has an average, ema={ema}")
    # the libraries report a file that cannot be opened as missing or damaged
    os.close(retried(lambda: open_regular(path)))
    return _of_safetensors(path) if path.suffix == ".safetensors" else _of_torch(path)


def read_model(path: Path, *, ema: str | None = None) -> dict[str, Any]:
    """Return the state of the model in the folder of a checkpoint, as `load_state_dict` takes it.

    It may hold values that are no tensors, those of `get_extra_state`; for `ema` and errors see
    `read_weights`.
    """
    from distrain.checkpoint.decode import load_checkpoint

    try:
        state = load_checkpoint(path)
    except fmt.CheckpointDamaged as error:
        raise ConfigError(f"{error}; give another checkpoint") from error
    model = state.get(fmt.MODEL_PART)
    if not isinstance(model, dict):
        raise ConfigError(
            f"{path}: it holds no state of a model, a dict called {fmt.MODEL_PART}; it has the "
            f"parts {', '.join(state)}"
        )
    if ema is not None:
        averages = _averages(state.get("hooks"))
        if ema not in averages:
            names = ", ".join(averages) or "none"
            raise ConfigError(f"{path}: it holds no average called ema={ema}; available: {names}")
        model.update(averages[ema])
    return model


def _averages(hooks: Any) -> dict[str, Mapping[str, Tensor]]:
    """Return the averages in the states of hooks, by the hook's name; a user's may be anything."""
    states = hooks.items() if isinstance(hooks, Mapping) else ()
    found = {name: s.get("average") for name, s in states if isinstance(s, Mapping)}
    return {
        name: average for name, average in found.items() if isinstance(average, Mapping) and average
    }


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
            f"{path}: not a file of tensors, or one with other objects, which would run code; "
            "save model.state_dict() with torch.save"
        ) from error
    except Exception as error:  # each part of the file has its own exceptions
        raise ConfigError(f"{path}: torch.load cannot read it: {error!s:.200}") from error
    if isinstance(found, Mapping):
        # a wrapped one first: next to it may be tensors such as the best accuracy
        for node in (*(found[key] for key in _WRAPPED if key in found), found):
            if isinstance(node, Mapping) and (tensors := _tensors(node)):
                return tensors
    content = f"a dict of {', '.join(map(str, found))}" if isinstance(found, dict) else type(found)
    raise ConfigError(f"{path}: it holds {content!s:.200}, not a state dict")


def _tensors(node: Mapping[Any, Any]) -> dict[str, Tensor]:
    from torch import Tensor

    return {str(name): value for name, value in node.items() if isinstance(value, Tensor)}

"""Transforms: functions from model to model, called before the optimizer is built."""

from typing import TYPE_CHECKING

from distrain._lazy import attach

if TYPE_CHECKING:
    from distrain.transforms.activations import checkpoint_activations
    from distrain.transforms.adapters import add_lora
    from distrain.transforms.compilation import compile_blocks
    from distrain.transforms.precision import train_in_float8

_MODULE_OF = {
    "add_lora": "adapters",
    "checkpoint_activations": "activations",
    "compile_blocks": "compilation",
    "train_in_float8": "precision",
}
__getattr__, __dir__ = attach(__name__, _MODULE_OF)

__all__ = ["add_lora", "checkpoint_activations", "compile_blocks", "train_in_float8"]

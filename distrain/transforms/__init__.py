"""Transforms: functions from model to model, called before the optimizer is built."""

from distrain.transforms.activations import checkpoint_activations
from distrain.transforms.adapters import add_lora
from distrain.transforms.compilation import compile_blocks
from distrain.transforms.precision import train_in_float8

__all__ = ["add_lora", "checkpoint_activations", "compile_blocks", "train_in_float8"]

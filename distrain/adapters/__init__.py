"""Adapters for models of Lightning and Hugging Face; neither library is imported."""

from distrain.adapters.huggingface import HuggingFaceModel
from distrain.adapters.lightning import LightningModel

__all__ = ["HuggingFaceModel", "LightningModel"]

"""Adapters for models of Lightning and Hugging Face; neither library is imported."""

from distrain.adapters.huggingface import HuggingFaceModel
from distrain.adapters.lightning import LightningModel
from distrain.adapters.lightning_manual import LightningManualStep

__all__ = ["HuggingFaceModel", "LightningManualStep", "LightningModel"]

"""Models written for other trainers, trained as they are; neither library is imported."""

from distrain.adapters.huggingface import HuggingFaceModel
from distrain.adapters.lightning import LightningModel

__all__ = ["HuggingFaceModel", "LightningModel"]

"""HuggingFaceModel: train a model of transformers, or of its interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from distrain.errors import ConfigError


class HuggingFaceModel(nn.Module):
    """Trains a model whose `forward(**batch)` returns an output with a `loss`.

    A sample of the data set is a dict with the arguments of the model's forward, labels included.
    Evaluation reports `eval/loss`: the mean over batches, weighted by their size. `eval.metrics`
    get the logits as `preds` and the labels as `target`.

    Args:
        model: called as `model(**batch)`; `trainer.module.model.save_pretrained(folder)` writes it
            in the format of its library.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the loss () of a batch.

        Raises:
            ConfigError: the batch is not a dict, or the model returned no loss.
        """
        if not isinstance(batch, Mapping):
            raise ConfigError(
                f"data.train: a batch is a {type(batch).__name__}; a Hugging Face model takes a "
                "dict: let __getitem__ return {'input_ids': ..., 'labels': ...}"
            )
        output = self.model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise ConfigError(
                f"data.train: {type(self.model).__name__} returned no loss for the keys "
                f"{', '.join(map(str, batch))}; add labels to the samples"
            )
        assert isinstance(loss, Tensor)
        return loss

    def predict(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return `preds`, the model's logits, and `target`, the labels of the batch if it has any.

        Raises:
            ConfigError: the model returned no logits.
        """
        output = self.model(**batch)
        is_mapping = isinstance(output, Mapping)
        logits = output.get("logits") if is_mapping else getattr(output, "logits", None)
        if logits is None:
            kind = type(self.model).__name__
            raise ConfigError(f"model: {kind} returned no logits; wrap it with a predict of yours")
        return {"preds": logits} | ({"target": batch["labels"]} if "labels" in batch else {})

"""A loss over the samples of all ranks: contrastive learning of images and texts.

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020. The default step trains it::

    model: {_target_: examples.clip.CLIP, image: {_target_: my.Vision}, text: {_target_: my.Text}}
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from distrain.distributed import gather_with_gradients, topology


class CLIP(nn.Module):
    """Each image of a batch belongs to its text and to no other, of all ranks.

    Args:
        image: images -> (B, D).
        text: texts -> (B, D).
    """

    def __init__(self, image: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.log_scale = nn.Parameter(torch.tensor(2.66))  # of 1 / 0.07

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        """Return the () mean over this rank's rows, compared with those of all ranks."""
        own = [
            functional.normalize(embed, dim=1) for embed in (self.image(images), self.text(texts))
        ]
        all_images, all_texts = (gather_with_gradients(rows) for rows in own)  # (W * B, D)
        first = topology().rank * len(images)
        target = torch.arange(first, first + len(images), device=images.device)
        scale = self.log_scale.exp()
        to_texts = functional.cross_entropy(scale * own[0] @ all_texts.T, target)
        to_images = functional.cross_entropy(scale * own[1] @ all_images.T, target)
        return (to_texts + to_images) / 2

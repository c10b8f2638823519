"""Settings and a model that the tests of parameter groups share."""

import torch
from torch import nn

BASE = {
    "lr": 0.1,
    "weight_decay": 1e-4,
    "weight_decay_norm": 0.0,
    "bias_lr_factor": 2.0,
    "weight_decay_bias": 5e-5,
}


class Vit(nn.Module):
    """The layout of a vision transformer: a token at the root, an embedding, blocks, norm, head."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 4))
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

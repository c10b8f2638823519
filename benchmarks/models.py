"""What is trained: models that take a batch and return its loss, their optimizer, batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """A network with cross-entropy on top."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:  # (B, ...), (B,) -> ()
        return F.cross_entropy(self.layers(inputs), labels)


def mlp() -> Classifier:
    """Return the small one, 64-64-10: all that is not arithmetic shows."""
    return Classifier(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def conv_net() -> Classifier:
    """Return a convolutional network for images of 28x28."""
    return Classifier(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # (B, 32, 14, 14)
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # (B, 64, 7, 7)
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 10),
    )


# by name: how a small one is made, and the shape of a sample
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (64,)),
    "conv net": (conv_net, (1, 28, 28)),
}


class Bottleneck(nn.Module):
    """The block of ResNet-50: 1x1, 3x3, 1x1 convolutions beside a shortcut."""

    def __init__(self, num_in: int, width: int, stride: int) -> None:
        super().__init__()
        num_out = 4 * width
        self.layers = nn.Sequential(
            *conv_norm(num_in, width, 1),
            nn.ReLU(inplace=True),
            *conv_norm(width, width, 3, stride),
            nn.ReLU(inplace=True),
            *conv_norm(width, num_out, 1),
        )
        is_same = num_in == num_out and stride == 1
        self.shortcut = nn.Sequential(*([] if is_same else conv_norm(num_in, num_out, 1, stride)))

    def forward(self, x: Tensor) -> Tensor:  # (B, num_in, H, W) -> (B, 4 width, H/s, W/s)
        return F.relu(self.layers(x) + self.shortcut(x))


def conv_norm(num_in: int, num_out: int, size: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution with its normalisation: three tensors."""
    conv = nn.Conv2d(num_in, num_out, size, stride, size // 2, bias=False)
    return [conv, nn.BatchNorm2d(num_out)]


def resnet50(width: int = 64) -> Classifier:
    """Return ResNet-50 (He et al. 2015, table 1; stride in the 3x3): 161 tensors, 25.6 M numbers.

    Args:
        width: channels of the first convolution; 4 makes it 1/16 as wide.
    """
    layers = [*conv_norm(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    num_in = width
    for stage, depth in enumerate((3, 4, 6, 3)):
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(Bottleneck(num_in, width << stage, stride))
            num_in = 4 * width << stage
    return Classifier(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(num_in, 1000))


class GPT(nn.Module):
    """A GPT-2 in its smallest size: 12 layers, 768 wide, 124 M parameters (tied embedding)."""

    def __init__(
        self, *, vocabulary: int = 50304, length: int = 1024, depth: int = 12, width: int = 768
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(GPTBlock(width, num_heads=width // 64) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:  # (B, T), (B, T) -> ()
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.token.weight)  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class GPTBlock(nn.Module):
    """Causal attention and a feed-forward network, each behind a norm and beside a shortcut."""

    def __init__(self, width: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        parts = self.qkv(self.norm_attention(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, D/heads)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


def new_optimizer(model: nn.Module, *, fused: bool = True) -> torch.optim.Optimizer:
    """Return the same for all."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=fused)


def new_batches(shape: tuple[int, ...], *, num: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Return batches of 32 random samples of ten classes."""
    torch.manual_seed(0)
    return [(torch.randn(32, *shape), torch.randint(10, (32,))) for _ in range(num)]

"""Handwritten digits: 1,797 real images of 8x8 pixels and a small network with BatchNorm.

The images come with scikit-learn, as those of `sklearn.datasets.load_digits`: the test part of
"Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, 1998,
https://doi.org/10.24432/C50P49).
"""

from importlib.metadata import distribution
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

CLASSES = 10
SIDE = 8  # pixels
TEST_FRACTION = 0.2
SPLIT_SEED = 1797  # independent of the run's seed: the same images are always held out

Split = Literal["train", "test"]


def split_indices(labels: Tensor, split: Split) -> Tensor:
    """Return the indices of the images in a split, increasing: a fifth of every class is held out.

    Args:
        labels: (N,) int64, class of each image.
        split: "train" or "test", else ValueError.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: allowed are 'train' and 'test'")
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(len(labels), generator=generator)
    chosen = []
    for label in range(CLASSES):
        members = order[labels[order] == label]
        held_out = round(TEST_FRACTION * len(members))
        chosen.append(members[:held_out] if split == "test" else members[held_out:])
    return torch.cat(chosen).sort().values


def load_split(split: Split) -> tuple[Tensor, Tensor]:
    """Return the images (N, 8, 8) float32 in [0, 1] and the labels (N,) int64 of one split."""
    # importing sklearn.datasets takes almost as long as torch
    file = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = torch.from_numpy(np.loadtxt(str(file), delimiter=","))  # (N, 64 pixels and a label)
    images = table[:, :-1].reshape(-1, SIDE, SIDE).float() / 16  # gray levels are 0 to 16
    labels = table[:, -1].long()
    chosen = split_indices(labels, split)
    return images[chosen], labels[chosen]


def shifted(image: Tensor, *, down: int, right: int) -> Tensor:
    """Return `image` (H, W) moved by whole pixels and padded with zeros."""
    height, width = image.shape
    reach = max(abs(down), abs(right))
    padded = functional.pad(image, (reach, reach, reach, reach))
    top, left = reach - down, reach - right
    return padded[top : top + height, left : left + width]


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Digits of one split; in training each is moved at random by up to one pixel.

    A sample is an image (1, 8, 8) float32 in [0, 1] and its label () int64. The random move is
    drawn from torch's global generator, which the loader seeds per (seed, epoch, sample) with
    `data.seed_samples=true`.

    Args:
        split: "train" (1,438 images) or "test" (359 images).
        max_shift: largest move along each side, in pixels; 0 in the test split.
    """

    def __init__(self, split: Split = "train", *, max_shift: int = 1) -> None:
        self.images, self.labels = load_split(split)  # (N, 8, 8), (N,)
        self.max_shift = max_shift if split == "train" else 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        if self.max_shift:
            down, right = torch.randint(-self.max_shift, self.max_shift + 1, (2,)).tolist()
            image = shifted(image, down=down, right=right)
        return image.unsqueeze(0), self.labels[index]


class DigitsNet(nn.Module):
    """Three convolutions with BatchNorm, a mean over the image and a linear layer.

    Args:
        width: channels of the first convolution; the two others have twice as many.
    """

    def __init__(self, *, width: int = 24) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(1, width),
            *_convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *_convolution(2 * width, 2 * width),
            nn.MaxPool2d(2),
        )
        self.classify = nn.Linear(2 * width * 4, CLASSES)

    def logits(self, images: Tensor) -> Tensor:
        """Return the scores (B, 10) of `images` (B, 1, 8, 8)."""
        features = self.features(images)  # (B, 2 width, 2, 2)
        scores: Tensor = self.classify(features.flatten(1))  # (B, 10)
        return scores.float()

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy () of `images` (B, 1, 8, 8) and `labels` (B,)."""
        return functional.cross_entropy(self.logits(images), labels)

    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return `accuracy` (B,): 1 where the highest score is the label's, else 0."""
        return {"accuracy": (self.logits(images).argmax(dim=1) == labels).float()}

    def predict(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return `digit` (B,) and `probabilities` (B, 10)."""
        scores = self.logits(images)
        return {"digit": scores.argmax(dim=1), "probabilities": scores.softmax(dim=1)}


def _convolution(channels_in: int, channels_out: int) -> tuple[nn.Module, ...]:
    """Return a 3x3 convolution without bias, BatchNorm and ReLU."""
    return (
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )

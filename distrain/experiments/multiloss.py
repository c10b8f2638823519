"""Find a digit on a canvas: several named losses, images and histograms, as in a detector.

A box is four numbers `left, top, right, bottom`, each a fraction of the canvas' side.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from distrain.events.storage import EventStorage, get_event_storage
from distrain.experiments.digits import CLASSES, SIDE, Split, load_split

CANVAS = 32  # pixels
SCALES = (1.25, 2.75)  # a digit is 10 to 22 pixels large
TRUE_COLOR = (0.1, 0.9, 0.1)  # green
FOUND_COLOR = (1.0, 0.2, 0.2)  # red


def ink_boxes(images: Tensor) -> Tensor:
    """Return the bounding boxes (N, 4), in pixels, of the ink in `images` (N, H, W)."""
    rows, columns = images.amax(dim=2) > 0, images.amax(dim=1) > 0  # (N, H), (N, W)
    ends = []
    for inked in (columns, rows):
        first = inked.int().argmax(dim=1)
        last = inked.shape[1] - inked.flip(1).int().argmax(dim=1)
        ends += [first, last]
    left, right, top, bottom = ends
    return torch.stack([left, top, right, bottom], dim=1).float()


def render(images: Tensor, *, corner: Tensor, scale: Tensor) -> Tensor:
    """Return canvases with each digit scaled and moved, with bilinear interpolation.

    Args:
        images: (B, 8, 8).
        corner: (B, 2), x and y of the digit's upper left corner, in pixels of the canvas.
        scale: (B,), pixels of the canvas per pixel of the digit.

    Returns:
        (B, 1, 32, 32).
    """
    centers = torch.arange(CANVAS) + 0.5
    places = (centers - corner[:, :, None]) / scale[:, None, None]  # (B, 2, 32), pixels of a digit
    x, y = (places * 2 / SIDE - 1).unbind(1)  # each (B, 32), from -1 to 1 inside the digit
    shape = (len(images), CANVAS, CANVAS)
    grid = torch.stack([x[:, None, :].expand(shape), y[:, :, None].expand(shape)], dim=3)
    return functional.grid_sample(images.unsqueeze(1), grid, align_corners=False)


class DigitCanvas(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Canvases with one digit each, whose place and size depend on the index alone.

    A sample is a canvas (1, 32, 32) float32 in [0, 1], its label () int64 and its box (4,).

    Args:
        split: "train" or "test", see `digits.load_split`.
        canvases: number of canvases per digit.
        places_seed: seed of places and sizes, independent of the seed of the run.
    """

    def __init__(self, split: Split = "train", *, canvases: int = 8, places_seed: int = 0) -> None:
        self.digits, self.labels = load_split(split)  # (N, 8, 8), (N,)
        self.inks = ink_boxes(self.digits)  # (N, 4)
        generator = torch.Generator().manual_seed(places_seed)
        draws = torch.rand(len(self.digits) * canvases, 3, generator=generator)
        self.scale = SCALES[0] + (SCALES[1] - SCALES[0]) * draws[:, 0]  # (N canvases,)
        self.corner = draws[:, 1:] * (CANVAS - SIDE * self.scale[:, None])  # (N canvases, 2)

    def __len__(self) -> int:
        return len(self.scale)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        canvases, labels, boxes = self.get_batch(torch.tensor([index]))
        return canvases[0], labels[0], boxes[0]

    def get_batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return canvases (B, 1, 32, 32), labels (B,) and boxes (B, 4) of `indices` (B,)."""
        digit = indices % len(self.digits)
        corner, scale = self.corner[indices], self.scale[indices]
        canvases = render(self.digits[digit], corner=corner, scale=scale)
        boxes = corner.repeat(1, 2) + scale[:, None] * self.inks[digit]  # (B, 4), pixels
        return canvases, self.labels[digit], boxes / CANVAS


def box_iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Return intersection over union (B,) of `boxes` (B, 4) and `others` (B, 4), pair by pair.

    Example: (0, 0, 2, 2) and (1, 1, 3, 3) share 1 of 4 + 4 - 1 = 7: 0.1429.
    """
    low = torch.maximum(boxes[:, :2], others[:, :2])  # (B, 2)
    high = torch.minimum(boxes[:, 2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=1)
    areas = [(b[:, 2:] - b[:, :2]).clamp(min=0).prod(dim=1) for b in (boxes, others)]
    return shared / (areas[0] + areas[1] - shared).clamp(min=1e-9)


def draw_box(image: Tensor, box: Tensor, color: tuple[float, float, float]) -> None:
    """Draw the outline of `box` (4,), one pixel wide, into `image` (3, H, W), in place."""
    height, width = image.shape[1:]
    sides = torch.tensor([width, height, width, height])
    left, top, right, bottom = (box.cpu() * sides).round().int().tolist()
    left, right = (min(max(x, 0), width - 1) for x in (left, right))
    top, bottom = (min(max(y, 0), height - 1) for y in (top, bottom))
    paint = torch.tensor(color)[:, None]
    image[:, top : bottom + 1, left] = image[:, top : bottom + 1, right] = paint
    image[:, top, left : right + 1] = image[:, bottom, left : right + 1] = paint


def draw_found(canvases: Tensor, *, boxes: Tensor, found: Tensor, zoom: int = 3) -> Tensor:
    """Return the canvases side by side, with true boxes in green and predictions in red.

    Args:
        canvases: (B, 1, H, W) in [0, 1].
        boxes: (B, 4), true boxes.
        found: (B, 4), predictions.
        zoom: pixels of the result per pixel of a canvas.

    Returns:
        (3, zoom * H, B * zoom * W) float32 in [0, 1], on the CPU.
    """
    strip = []
    for canvas, box, guess in zip(canvases.cpu().float(), boxes, found, strict=True):
        image = canvas.clamp(0, 1).expand(3, -1, -1)
        image = image.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
        draw_box(image, box, TRUE_COLOR)
        draw_box(image, guess, FOUND_COLOR)
        strip.append(image)
    return torch.cat(strip, dim=2)


class DigitFinder(nn.Module):
    """Convolutional backbone with two heads: class and box of the digit.

    In training it puts accuracy and box IoU of every iteration into the EventStorage and, every
    `image_period` iterations, an image of eight canvases with their boxes and a histogram of IoU.

    Args:
        width: channels of the first convolution; the last has four times as many.
        box_weight: factor of the box loss.
        image_period: iterations per image; 0 for none.
    """

    def __init__(
        self, *, width: int = 16, box_weight: float = 10.0, image_period: int = 100
    ) -> None:
        super().__init__()
        self.box_weight = box_weight
        self.image_period = image_period
        self.backbone = nn.Sequential(
            *_convolution(1, width, stride=2),  # (B, width, 16, 16)
            *_convolution(width, 2 * width, stride=1),
            *_convolution(2 * width, 4 * width, stride=2),  # (B, 4 width, 8, 8)
            *_convolution(4 * width, 4 * width, stride=2),  # (B, 4 width, 4, 4)
            nn.Flatten(),
            nn.Linear(4 * width * 16, 128),
            nn.ReLU(inplace=True),
        )
        self.class_head = nn.Linear(128, CLASSES)
        self.box_head = nn.Linear(128, 4)

    def predict(self, canvases: Tensor) -> tuple[Tensor, Tensor]:
        """Return class scores (B, 10) and boxes (B, 4) for `canvases` (B, 1, 32, 32)."""
        features = self.backbone(canvases)  # (B, 128)
        center, size = self.box_head(features).float().sigmoid().split(2, dim=1)  # each (B, 2)
        found = torch.cat([center - size / 2, center + size / 2], dim=1)
        return self.class_head(features).float(), found

    def forward(self, canvases: Tensor, labels: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Return `loss_class` () and `loss_box` (); the arguments are a batch of DigitCanvas."""
        scores, found = self.predict(canvases)
        if self.training:
            self._report(canvases, labels, boxes, scores.detach(), found.detach())
        loss_box = functional.smooth_l1_loss(found, boxes, beta=0.02)
        return {
            "loss_class": functional.cross_entropy(scores, labels),
            "loss_box": self.box_weight * loss_box,
        }

    def metrics(self, canvases: Tensor, labels: Tensor, boxes: Tensor) -> dict[str, Tensor]:
        """Return `accuracy` (B,), 1 or 0 each, and `box_iou` (B,) from 0 to 1."""
        scores, found = self.predict(canvases)
        accuracy = (scores.argmax(dim=1) == labels).float()
        return {"accuracy": accuracy, "box_iou": box_iou(found, boxes)}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _report(
        self, canvases: Tensor, labels: Tensor, boxes: Tensor, scores: Tensor, found: Tensor
    ) -> None:
        """Put scalars, an image and a histogram of the batch into the EventStorage, if any."""
        storage = _storage()
        if storage is None:
            return
        iou = box_iou(found, boxes)  # (B,)
        accuracy = (scores.argmax(dim=1) == labels).float().mean()
        with storage.name_scope("batch"):
            storage.put_scalars(accuracy=accuracy, box_iou=iou.mean())
            if self.image_period and storage.iter % self.image_period == 0:
                drawn = draw_found(canvases[:8], boxes=boxes[:8], found=found[:8])
                storage.put_image("boxes", drawn)
                storage.put_histogram("box_iou", iou)


def _storage() -> EventStorage | None:
    """Return the current EventStorage, None outside of training."""
    try:
        return get_event_storage()
    except RuntimeError:
        return None


def _convolution(channels_in: int, channels_out: int, *, stride: int) -> tuple[nn.Module, ...]:
    """Return a 3x3 convolution without bias, BatchNorm and ReLU."""
    return (
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )

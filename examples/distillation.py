"""A model with a frozen part: a student that learns from a teacher.

Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531::

    model:
      _target_: examples.distillation.Distilled
      student: {_target_: my.Small}
      teacher: {_target_: distrain.load, run: runs/large}
"""

from torch import Tensor, nn
from torch.nn import functional


class Distilled(nn.Module):
    """The student's loss: cross entropy with the labels and with the teacher's probabilities.

    Args:
        student: images -> logits (B, C).
        teacher: the same; frozen and in eval mode.
        temperature: of both probabilities.
        weight: of the teacher's part, in [0, 1].
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, temperature: float = 2.0, weight: float = 0.5
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False).eval()
        self.temperature, self.weight = temperature, weight

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return both losses."""
        logits, t = self.student(images), self.temperature
        soft = (self.teacher(images) / t).softmax(1)
        teacher = functional.cross_entropy(logits / t, soft) * t * t
        hard = functional.cross_entropy(logits, labels)
        return {"teacher_loss": self.weight * teacher, "label_loss": (1 - self.weight) * hard}

    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return (B,) whether the student is right."""
        return {"accuracy": self.student(images).argmax(1).eq(labels).float()}

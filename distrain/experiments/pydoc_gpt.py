"""A small character-level GPT on the text of Python's own documentation.

The text is `pydoc_data.topics` of the running interpreter, so its length depends on the Python
version (377,000 characters in 3.11); the vocabulary does not. Letters in shapes:

    B windows of a batch     T characters of a window     V size of the vocabulary
    C width of the network   H attention heads            D = C / H width of a head
"""

import math
from functools import cache
from pydoc_data.topics import topics
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))  # printable ASCII
OTHER = len(ALPHABET)  # every other character: about one in a thousand
VOCABULARY = len(ALPHABET) + 1
HELD_OUT_FRACTION = 0.1

Split = Literal["train", "test"]


@cache
def corpus() -> str:
    """Return the documentation as one text without repeated paragraphs."""
    # a fifth of the text in Python 3.11 is repeated: the test split would be known from training
    paragraphs = (part.strip("\n") for topic in topics.values() for part in topic.split("\n\n"))
    return "\n\n".join(dict.fromkeys(paragraphs))


def encode(text: str) -> Tensor:
    """Return the index of each character in the alphabet: (characters,) int64."""
    numbers = {character: number for number, character in enumerate(ALPHABET)}
    return torch.tensor([numbers.get(character, OTHER) for character in text], dtype=torch.int64)


class PydocText(Dataset[tuple[Tensor, Tensor]]):
    """Windows of the text: `context` characters and, shifted by one, their targets.

    A sample is (inputs (T,), targets (T,)), both int64. Training windows begin at every character
    of the first 90 %. Test windows tile the last 10 %: each character is predicted once.

    Args:
        split: "train" or "test".
        context: T, characters of a window.

    Raises:
        ValueError: another split, or a context longer than its text.
    """

    def __init__(self, split: Split = "train", *, context: int = 96) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"split={split!r}: allowed are 'train' and 'test'")
        text = corpus()
        boundary = len(text) - round(HELD_OUT_FRACTION * len(text))
        self.text = encode(text[:boundary] if split == "train" else text[boundary:])
        if not 0 < context < len(self.text):
            raise ValueError(f"context={context}: allowed are 1 to {len(self.text) - 1}")
        self.context = context
        self.stride = 1 if split == "train" else context

    def __len__(self) -> int:
        return (len(self.text) - 1 - self.context) // self.stride + 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.get_batch(torch.tensor([index]))
        return inputs[0], targets[0]

    def get_batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets (B, T) int64 of the windows `indices` (B,) in one gather."""
        places = indices[:, None] * self.stride + torch.arange(self.context + 1)  # (B, T + 1)
        windows = self.text[places]
        return windows[:, :-1], windows[:, 1:]


class SelfAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the attention output (B, T, C) for `x` (B, T, C)."""
        split = self.query_key_value(x).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, D)
        query, key, value = split.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        gathered = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.project(gathered.transpose(1, 2).flatten(2))  # (B, T, C)
        return result


class Block(nn.Module):
    """Pre-norm transformer layer: attention and MLP, each with a residual connection."""

    def __init__(self, width: int, *, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads=heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output (B, T, C) for `x` (B, T, C)."""
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x  # noqa: RET504 - symmetric to the line above


class CharGpt(nn.Module):
    """A pre-norm transformer decoder with tied input and output embeddings.

    Initial values follow GPT-2 (A. Radford et al., "Language Models are Unsupervised Multitask
    Learners", 2019): standard deviation 0.02, and 0.02 / sqrt(2 * depth) for projections into the
    residual stream. An untrained model predicts a uniform distribution: its loss is about
    ln(97) = 4.57 nats, 6.6 bits.

    Args:
        context: T, largest number of characters in `inputs`.
        depth: number of layers.
        width: C.
        heads: H; must divide `width`, else ValueError.
    """

    def __init__(
        self, *, context: int = 96, depth: int = 3, width: int = 96, heads: int = 4
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads={heads}: must divide width={width}")
        self.character = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads=heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self._initialize(depth)

    def _initialize(self, depth: int) -> None:
        """Initialise matrices, with a smaller deviation at the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_on_stream = name.endswith(("project.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth if ends_on_stream else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def logits(self, inputs: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the next character for `inputs` (B, T)."""
        places = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.character(inputs) + self.place(places)  # (B, T, C)
        x = self.norm(self.blocks(x))
        return functional.linear(x, self.character.weight).float()  # (B, T, V)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy () in nats; `inputs` and `targets` are (B, T) int64."""
        return functional.cross_entropy(self.logits(inputs).flatten(0, 1), targets.flatten())

    def metrics(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return `bits_per_char` (B,): the mean over each window of -log2 p(target)."""
        scores = self.logits(inputs).transpose(1, 2)  # (B, V, T)
        nats = functional.cross_entropy(scores, targets, reduction="none")  # (B, T)
        return {"bits_per_char": nats.mean(dim=1) / math.log(2)}

"""Seeds and states of the random generators of Python, NumPy and torch."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from distrain.data.random_states import cpu_random_states, restore_cpu_random_states


def seed_everything(seed: int, *, rank: int) -> None:
    """Seed Python, NumPy and torch (all devices), each rank differently."""
    words = np.random.SeedSequence([seed, rank]).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1] % 2**32))
    torch.manual_seed(int(words[2] >> 1))


def random_states() -> dict[str, Any]:
    """Return the states of this process's random generators, for `restore_random_states`."""
    states = cpu_random_states()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Set the random generators to the states that `random_states` returned."""
    restore_cpu_random_states(states)
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

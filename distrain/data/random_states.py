"""States of the CPU generators of Python, NumPy and torch, as a checkpoint can hold them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

_NUMPY_STATE = ("name", "keys", "position", "has_gauss", "cached")  # of np.random.get_state


def cpu_random_states() -> dict[str, Any]:
    """Return the states of this process, for `restore_cpu_random_states`."""
    version, internal, gauss = random.getstate()
    return {
        "python": {"version": version, "internal": np.array(internal), "gauss": gauss},
        "numpy": dict(zip(_NUMPY_STATE, np.random.get_state(legacy=True), strict=True)),
        "torch": torch.get_rng_state(),
    }


def restore_cpu_random_states(states: dict[str, Any]) -> None:
    """Set the generators to the states that `cpu_random_states` returned."""
    python, legacy = states["python"], states["numpy"]
    internal = tuple(int(word) for word in python["internal"])
    random.setstate((python["version"], internal, python["gauss"]))
    np.random.set_state(tuple(legacy[name] for name in _NUMPY_STATE))
    torch.set_rng_state(states["torch"])

"""CPU generators of Python, NumPy and torch: seeded, kept, exchanged, saved."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_NUMPY_STATE = ("name", "keys", "position", "has_gauss", "cached")  # of np.random.get_state


def set_generators(seed: int) -> None:
    """Seed python, numpy and torch's CPU generator with a seed of 64 bits."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed >> 1)


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Restore the states of python's, numpy's and torch's CPU generators at the end of `with`."""
    states = _states()
    try:
        yield
    finally:
        _set_states(states)


class Generators:
    """States of python's, numpy's and torch's CPU generators, apart from those of the process."""

    def __init__(self) -> None:
        self._states: tuple[Any, ...] | None = None  # None: as in the process, at first

    @contextlib.contextmanager
    def exchanged(self) -> Iterator[None]:
        """Let the generators of the process have these states, which go on, inside `with`."""
        before = _states()
        if self._states is not None:
            _set_states(self._states)
        try:
            yield
        finally:
            self._states = _states()
            _set_states(before)


def cpu_random_states() -> dict[str, Any]:
    """Return the states of this process as a checkpoint can hold them."""
    (version, internal, gauss), legacy, cpu = _states()
    return {
        "python": {"version": version, "internal": np.array(internal), "gauss": gauss},
        "numpy": dict(zip(_NUMPY_STATE, legacy, strict=True)),
        "torch": cpu.numpy(),  # a tensor would keep memory of a loader process in use
    }


def cpu_random_digest() -> str:
    """Return a digest of the states of this process, to compare them."""
    python, legacy, cpu = _states()
    digest = hashlib.sha256(repr((python, legacy[2:])).encode())
    digest.update(legacy[1].tobytes())
    digest.update(cpu.numpy().tobytes())
    return digest.hexdigest()


def restore_cpu_random_states(states: dict[str, Any]) -> None:
    """Set the generators to the states that `cpu_random_states` returned."""
    python, legacy = states["python"], states["numpy"]
    internal = tuple(int(word) for word in python["internal"])
    own = (python["version"], internal, python["gauss"])
    cpu = torch.as_tensor(states["torch"])  # an earlier version saved a tensor
    _set_states((own, tuple(legacy[name] for name in _NUMPY_STATE), cpu))


def _states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])

"""Environment variables set by a launcher, a scheduler or a container."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from distrain.errors import ConfigError


def env_int(name: str, default: int = 0) -> int:
    """Return the int in an environment variable, else ConfigError; `default` if unset or empty."""
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else default
    except ValueError:
        raise ConfigError(f"{name}={text}: expected an integer; unset it") from None


RETURNS = "DISTRAIN_RETURNS"
"""Environment variable: how often the run has stepped aside for others and come back."""


def restart_count() -> int:
    """Return the number of restarts of this run by torchelastic, SLURM and `launch.nice`."""
    return sum(map(env_int, ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", RETURNS)))


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside `with`."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

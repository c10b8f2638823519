"""Integers in environment variables: set by a launcher, a scheduler or a container."""

from __future__ import annotations

import os

from distrain.errors import ConfigError


def env_int(name: str, default: int = 0) -> int:
    """Return the integer in an environment variable; the default if it is unset or empty.

    Raises:
        ConfigError: it holds something else.
    """
    text = os.environ.get(name, "").strip()
    try:
        return int(text) if text else default
    except ValueError:
        raise ConfigError(f"{name}={text}: expected an integer; unset it") from None


def restart_count() -> int:
    """Return how often torchelastic and SLURM have restarted this run without a user."""
    return env_int("TORCHELASTIC_RESTART_COUNT") + env_int("SLURM_RESTART_COUNT")

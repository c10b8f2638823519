"""URLs of checkpoint mirrors: the stores available, and the libraries they need."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from distrain.checks import shown
from distrain.errors import ConfigError

LIBRARIES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "file": "fsspec", "memory": "fsspec"}
"""Scheme of a URL -> library that fsspec needs; the extra of distrain has the scheme's name."""


def mirror_of(conf: Mapping[str, Any]) -> str | None:
    """Return `checkpoint.mirror` without slashes at its end; None where it is null or missing."""
    settings = conf.get("checkpoint")
    url = settings.get("mirror") if isinstance(settings, Mapping) else None
    return url.rstrip("/") if isinstance(url, str) else None


def check_url(key: str, url: str) -> None:
    """Raise ConfigError for another scheme, credentials in the URL, or a library not installed."""
    scheme, colon, rest = url.partition("://")
    if not colon or scheme not in LIBRARIES:
        # neither the scheme nor the rest is known: it may hold a password
        given = shown(url) if {"@", "?"}.isdisjoint(url) else "***"
        fix = f"; a mounted folder is file://{url}" if url.startswith("/") else ""
        known = ", ".join(f"{name}://" for name in LIBRARIES)
        raise ConfigError(f"{key}={given}: expected a URL with one of {known}{fix}")
    if any(sign in rest.partition("/")[0] for sign in "@:") or "?" in rest or "#" in rest:
        raise ConfigError(
            f"{key}={scheme}://***: expected a URL without credentials and options; set them as "
            "environment variables or in the configuration files of the store's library"
        )
    if scheme == "file" and not rest.startswith("/"):
        raise ConfigError(f"{key}={shown(url)}: expected an absolute path, as file:///data/mirror")
    if not rest.strip("/"):
        raise ConfigError(f"{key}={shown(url)}: expected a folder, as {scheme}://bucket/runs/mine")
    library = LIBRARIES[scheme]
    if find_spec(library) is None:
        raise ConfigError(
            f'{key}={shown(url)}: expected the library {library}; pip install "distrain[{scheme}]"'
        )

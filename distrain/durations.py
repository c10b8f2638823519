"""Durations as text: lengths in epochs ("2 epochs") and in time ("2h30m")."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from distrain.errors import ConfigError

_EPOCHS = re.compile(r"\s*(\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+)\s*epochs?\s*")
_TIME = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_UNITS_S = (86_400, 3_600, 60, 1)


def epochs(value: Any) -> Fraction | None:
    """Return the number of epochs of a text, exactly; None for anything else.

    Example: "0.5 epoch" is 1/2, "3 epochs" is 3; 100 and "100" are None.
    """
    match = _EPOCHS.fullmatch(value) if isinstance(value, str) else None
    return Fraction(match[1]) if match and Fraction(match[1]) else None


def iterations(key: str, value: Any, *, iters_per_epoch: Fraction | None) -> int | Fraction:
    """Return a length in iterations, exactly: an int is one already.

    Example: "0.5 epoch" of 25 iterations per epoch is 25/2.

    Args:
        key: name of the length in the error.
        value: an int >= 1, or text in epochs.
        iters_per_epoch: None if the length of the data is unknown.

    Raises:
        ConfigError: neither of the two, or in epochs where the length is unknown.
    """
    found = epochs(value)
    if found is not None:
        if iters_per_epoch is None:
            raise ConfigError(
                f"{key}={value}: expected a number of iterations, as the length of the data is "
                "unknown; an epoch needs a data set or DataLoader with a length, or a loader with "
                "num_samples and samples_per_forward"
            )
        return found * iters_per_epoch
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key}={value}: expected an integer >= 1, or epochs, as '2 epochs'")
    return value


def whole_iterations(key: str, value: Any, *, iters_per_epoch: Fraction | None) -> int:
    """Return `iterations`, rounded up to a whole iteration."""
    return math.ceil(iterations(key, value, iters_per_epoch=iters_per_epoch))


def seconds(key: str, value: Any) -> float:
    """Return a duration in seconds: a number of seconds, or days, hours, minutes, seconds.

    Example: 90, "90" and "1m30s" are 90.0; "2h30m" is 9000.0.

    Raises:
        ConfigError: the value is not a duration above 0.
    """
    text = "" if isinstance(value, bool) else str(value).replace(" ", "")
    found = 0.0
    if match := _TIME.fullmatch(text):
        found = float(sum(int(n or 0) * s for n, s in zip(match.groups(), _UNITS_S, strict=True)))
    else:
        try:
            found = float(text)
        except ValueError:
            found = math.nan
    if not 0 < found < math.inf:
        raise ConfigError(f"{key}={value}: expected a duration, as 15m, 2h30m or 90 (seconds)")
    return found

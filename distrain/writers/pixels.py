"""Images as writers take them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def pixels(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Return a (C, H, W) or (H, W) image of uint8 or floats in [0, 1] as (H, W, C) or (H, W)."""
    if image.dtype.kind == "f":
        image = np.nan_to_num(image).clip(0, 1) * 255 + 0.5
    found = image.clip(0, 255).astype(np.uint8)
    if found.ndim == 3:
        return found[0] if found.shape[0] == 1 else found.transpose(1, 2, 0)
    return found

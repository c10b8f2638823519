"""Plot scalars of several runs."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distrain.errors import ConfigError
from distrain.extras import optional_library
from distrain.runs.escape import escaped
from distrain.runs.records import all_rows, curve, last_values

_COLUMNS = 3
_SIZE = (5.0, 3.4)  # of one pair of axes, in inches


def plot(
    runs: Sequence[tuple[str, Path]], *, patterns: Sequence[str], out: Path, smooth: int
) -> int:
    """Draw scalars over the iterations, one pair of axes per scalar, one line per run; return 0.

    `patterns` have wildcards, the suffix of `out` is the format, `smooth` counts rows.

    Raises:
        ConfigError: matplotlib is missing, a scalar is in no run, the picture cannot be written.
    """
    rows = {name: list(all_rows(path)) for name, path in runs}
    scalars = _choose(rows, patterns)
    matplotlib = optional_library("matplotlib.figure", extra="plot")
    agg = optional_library("matplotlib.backends.backend_agg", extra="plot")
    columns = min(len(scalars), _COLUMNS)
    lines = math.ceil(len(scalars) / columns)
    figure: Any = matplotlib.Figure(
        figsize=(_SIZE[0] * columns, _SIZE[1] * lines), layout="constrained"
    )
    agg.FigureCanvasAgg(figure)
    for index, scalar in enumerate(scalars):
        axes = figure.add_subplot(lines, columns, index + 1)
        for number, (name, of_run) in enumerate(rows.items()):
            _draw(axes, of_run, scalar, label=name, color=f"C{number % 10}", smooth=smooth)
        axes.set_title(escaped(scalar).replace("$", r"\$"))
        axes.set_xlabel("iteration")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    try:
        figure.savefig(out, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"-o {out}: {error}") from error
    print(escaped(f"{out}: {', '.join(scalars)} of {len(rows)} runs"))
    return 0


def _choose(rows: dict[str, list[dict[str, Any]]], patterns: Sequence[str]) -> list[str]:
    """Return the scalars that match, in the order of the patterns."""
    names = list(dict.fromkeys(name for of_run in rows.values() for name in last_values(of_run)))
    chosen: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            available = ", ".join(sorted(names)) or "nothing yet"
            raise ConfigError(f"--scalar {pattern}: in none of the runs; available: {available}")
        chosen.update(dict.fromkeys(found))
    return list(chosen)


def _draw(
    axes: Any, rows: list[dict[str, Any]], scalar: str, *, label: str, color: str, smooth: int
) -> None:
    """Draw a run's line; nothing if it has no such scalar."""
    x, y = curve(rows, scalar)
    if not x:
        return
    marker = "o" if len(x) == 1 else None
    if smooth > 1:
        axes.plot(x, y, color=color, alpha=0.25, linewidth=0.8)
        y = smoothed(y, smooth)
    label = escaped(label).replace("$", r"\$")
    axes.plot(x, y, color=color, label=label, linewidth=1.5, marker=marker)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and the `window - 1` before it, non-finite ones left out.

    Example: [1, 3, 5] with a window of 2 gives [1, 2, 4].
    """
    means = []
    for end in range(1, len(values) + 1):
        finite = [v for v in values[max(0, end - window) : end] if math.isfinite(v)]
        means.append(sum(finite) / len(finite) if finite else math.nan)
    return means

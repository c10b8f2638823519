"""Aligned text tables, and counts of things."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def table(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Return rows as aligned text, two spaces between columns; a row may have fewer cells.

    Args:
        rows: the cells; of a row with a single cell that cell does not widen the first column.
        right: indices of right-aligned columns.

    Example: `table([["loss", "0.25"], ["lr", "1"]], right=[1])` is `loss  0.25` and `lr       1`.
    """
    widths = [0] * max(map(len, rows), default=0)
    for row in rows:
        for index, cell in enumerate(row):
            if len(row) > 1 or len(widths) == 1:
                widths[index] = max(widths[index], len(cell))
    lines = []
    for row in rows:
        cells = [
            c.rjust(widths[i]) if i in right else c.ljust(widths[i]) for i, c in enumerate(row)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun.

    Example: `counted(1, "rank")` is `1 rank`, `counted(2, "rank")` is `2 ranks`.
    """
    return f"{number} {noun}" + "s" * (number != 1)

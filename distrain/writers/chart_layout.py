"""Charts of TensorBoard's Custom Scalars tab, chosen by the names of the scalars."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from distrain.scalar_names import NONDETERMINISTIC_PREFIXES

_NO_METRIC = "|".join([*NONDETERMINISTIC_PREFIXES, "lr/"])


def default_layout(names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Return charts: all losses, one per metric over all scopes, learning rates, performance.

    The regular expressions are general enough for charts of several runs to merge into one.

    Example:
        `["loss", "accuracy", "eval/accuracy", "perf/step_s"]` returns a chart "losses", a chart
        "accuracy" with both accuracies and a chart "seconds".
    """
    layout: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)
    for heading in ("losses", "metrics", "learning rate", "performance"):
        layout[heading] = {}
    for name in sorted(names):
        base = name.rpartition("/")[2]
        top = name.partition("/")[0]
        if top == "perf" and base.endswith("_s") and not base.endswith("_per_s"):
            layout["performance"]["seconds"] = [r"perf/(?!eta_s$)(?!.*_per_s$).*_s$"]
        elif f"{top}/" in NONDETERMINISTIC_PREFIXES:
            layout["performance"][f"{top} {base}"] = [rf"{top}/(.*/)?{re.escape(base)}$"]
        elif top == "lr":
            layout["learning rate"]["lr"] = ["lr(/.*)?$"]
        elif "loss" in name.lower() and top != "final":
            layout["losses"]["losses"] = [rf"(?!{_NO_METRIC})(?i:.*loss)"]
        elif top != "final":
            layout["metrics"][base] = [rf"(?!{_NO_METRIC})(.*/)?{re.escape(base)}$"]
    return {heading: charts for heading, charts in layout.items() if charts}

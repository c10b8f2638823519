"""Changes of the configuration between two starts of a run: free, permitted or refused."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distrain.checks import did_you_mean, shown
from distrain.config import check_keys
from distrain.errors import ConfigError, RunFailed
from distrain.redact import masked
from distrain.run_layout import STARTS_FILE
from distrain.runfolder.differences import covers, differences, flat
from distrain.runfolder.files import read_starts

FREE_KEYS = (
    *("launch", "resume", "plan", "run", "vars", "sweep", "data.workers"),
    *("checkpoint.keep_last", "checkpoint.keep_every", "checkpoint.on_error"),
    *("checkpoint.mirror_wait", "allow_changes", "trainer.max_time"),
    *("trainer.strategy", "trainer.fsdp"),  # sharding of the state; sums may round differently
)
"""Keys that may change between two starts of a run: they do not change the computation."""

_FREE_OF_HOOKS = ("period", "every")

HORIZON_KEYS = ("trainer.max_iter", "trainer.max_epochs", "schedule.max_iters")
"""Keys that may change, too, which is reported: a run may be extended."""

_REPORTED_KEYS = (*HORIZON_KEYS, "checkpoint.mirror")  # without it, states are on one disk only

Changed = Mapping[str, Sequence[Any]]
"""Changed keys, each with its old and its new value."""


def changed_keys(frozen: Mapping[str, Any], conf: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the keys that differ from a frozen configuration, each with its old and new value.

    Secrets are compared masked.
    """
    before: Mapping[str, Any] = masked(frozen)
    with contextlib.suppress(ConfigError):  # keys of earlier versions: reported as changed
        before = check_keys.check(dict(before))  # with the keys of later versions
    return {key: list(values) for key, values in differences(before, masked(conf)).items()}


def check_changes(
    place: str, changed: Changed, permitted: Sequence[str], *, elsewhere: str = "run.name"
) -> list[str]:
    """Return a notice per change that the user should know of.

    Args:
        place: of the frozen configuration, as key and value.
        changed: old and new value by dotted key.
        permitted: `allow_changes`.
        elsewhere: the key or option that names another folder, for the error.

    Raises:
        ConfigError: one of the keys may not change.
    """
    refused = [k for k, (old, new) in changed.items() if not _may_change(k, old, new, permitted)]
    if refused:
        lines = [
            f"{key}: {shown(changed[key][0], most=40)} -> {shown(changed[key][1], most=40)}"
            for key in refused[:5]
        ]
        more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        fix = f"give another {elsewhere}, or the old values to continue it"
        if not _is_fixed(refused[0]):
            fix += f", or allow_changes=[{','.join(refused[:5])}]"
        listed = ", ".join(lines) + more
        raise ConfigError(f"{place}: this run has another configuration ({listed}); {fix}")
    return [
        f"{key}: {shown(old)} -> {shown(new)} from here on"
        for key, (old, new) in changed.items()
        if not is_free(key)
    ]


def _may_change(key: str, old: Any, new: Any, permitted: Sequence[str]) -> bool:
    return not _is_fixed(key) and (
        is_free(key) or covers((*_REPORTED_KEYS, *permitted), key) or _is_path(key, old, new)
    )


def _is_fixed(key: str) -> bool:
    """Return whether a key may never change: another optimizer cannot use the saved state."""
    return key.startswith("optim.") and key.endswith(".target")


def is_free(key: str) -> bool:
    """Return whether a key may change without a notice."""
    parts = key.split(".")  # hooks.NAME.period, or that of an evaluation set below it
    is_period = parts[0] == "hooks" and len(parts) > 2 and parts[2] in _FREE_OF_HOOKS
    return is_period or covers(FREE_KEYS, key)


def _is_path(key: str, old: Any, new: Any) -> bool:
    """Return whether both values of a key of the data or of a hook are paths."""
    # data on a local disk has another path in each job ($SLURM_TMPDIR)
    return key.startswith(("data.", "hooks.")) and all(
        isinstance(value, str) and os.sep in value for value in (old, new)
    )


def check_permissions(conf: Mapping[str, Any], frozen: Mapping[str, Any] | None) -> None:
    """Raise ConfigError for an entry of `allow_changes` that is a key of neither configuration."""
    keys = [*flat(conf), *(key for key in flat(frozen or {}))]
    for entry in conf.get("allow_changes", ()):
        if not any(covers([str(entry)], key) for key in keys):
            hint = did_you_mean(str(entry), dict.fromkeys(keys))
            raise ConfigError(f"allow_changes=[{entry}]: no such key; {hint}")


def change_lines(start: Mapping[str, Any]) -> list[str]:
    """Return a line per change in the record of a start, as `optim.lr: 0.1 -> 0.05, from 100`."""
    changed = start.get("changed")
    if not isinstance(changed, dict):
        return []
    return [
        f"{key}: {shown(pair[0])} -> {shown(pair[1])} after iteration {start.get('iteration', '?')}"
        for key, pair in changed.items()
        if isinstance(pair, list) and len(pair) == 2 and not is_free(str(key))
    ]


def changes_of_run(run_dir: str | Path) -> list[str]:
    """Return the changes of all starts of a run; none if they cannot be read."""
    try:
        starts = read_starts(Path(run_dir, STARTS_FILE)) or []
    except RunFailed:
        return []
    return [line for start in starts if isinstance(start, dict) for line in change_lines(start)]

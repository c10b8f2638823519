"""Load a checkpoint into a trainer whose optimizer or schedule has other settings than saved ones.

A checkpoint holds the rates and settings of its optimizer and the position of its schedule. Where
the configuration has changed since it was saved (`allow_changes`), the new values count: the run
goes on as if the schedule had had them from the beginning. The state of the optimizer is kept.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler as TorchScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from distrain.errors import ConfigError
from distrain.log import logger
from distrain.runfolder.allowed_changes import HORIZON_KEYS
from distrain.runfolder.differences import covers, differences
from distrain.schedule.warmup import WarmupLR
from distrain.trainer.optimizers import ONLY
from distrain.trainer.trainer import Trainer

Conf = dict[str, Any]

_APPLIED = ("optim", "schedule")
_RATES = {"lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}
_RATE_KEYS = ("lr", "lr_factor", "bias_lr_factor", "layer_decay", "layers")
_DECAY_KEYS = ("weight_decay", "weight_decay_norm", "weight_decay_bias")
_CYCLED = {"momentum", "betas"}  # by OneCycleLR and CyclicLR


def settings_of(conf: Conf) -> Conf:
    """Return the settings that are saved in each checkpoint, to be compared when it is loaded."""
    return {
        "optim": conf["optim"],
        "schedule": conf["schedule"],
        "data": {"batch_size": conf["data"]["batch_size"]},
        "trainer": {"accumulation": conf["trainer"]["accumulation"]},
    }


def largest_forward(state: Mapping[str, Any] | None, conf: Conf) -> int | None:
    """Return the most samples per forward of a resumed run: as many as before, on fewer ranks too.

    None, without a limit, in a new run and where batch or accumulation have changed.
    """
    if state is None:
        return None
    saved, here = state.get("settings"), settings_of(conf)
    if saved and any(saved[name] != here[name] for name in ("data", "trainer")):
        return None
    size: int | None = state["stream"]["samples_per_forward"]
    return size


def load_state(
    trainer: Trainer, state: Mapping[str, Any], schedule: TorchScheduler | Mapping[str, Any]
) -> None:
    """Load a checkpoint's state; settings that have changed since are those of the trainer.

    Args:
        trainer: just built.
        state: of the checkpoint.
        schedule: of the trainer's optimizer, just built; several by name.

    Raises:
        ConfigError: the new settings group the parameters in another way.
    """
    saved = state.get("settings", trainer.settings)
    found = differences(saved, trainer.settings)
    by_rules = _keys_of_rules(saved["optim"]) | _keys_of_rules(trainer.settings["optim"])
    changed = [key for key in found if covers(_APPLIED, key)]
    schedules = schedule if isinstance(schedule, Mapping) else {ONLY: schedule}
    changes = [
        _Change(trainer, name, optimizer, schedules[name], keys, by_rules)
        for name, optimizer in trainer.optimizers.items()
        if (keys := _keys_of(name, changed, trainer.settings["schedule"], schedules[name]))
    ]
    for change in changes:
        change.check(state)
    trainer.load_state_dict({**state, "schedule": _positions(state, changes)})
    for change in changes:
        change.apply(state)
    if changes:
        logger.info("changed since the checkpoint: %s", ", ".join(changed))


def _keys_of(
    name: str, changed: Iterable[str], node: Conf | None, schedule: TorchScheduler
) -> list[str]:
    """Return the changed keys of one optimizer and its schedule, whose node is `node`."""
    # The state of a schedule of torch or the user holds the horizon; that of WarmupLR does not.
    if isinstance(schedule, WarmupLR):
        changed = [key for key in changed if not covers(HORIZON_KEYS, key)]
    if name == ONLY:
        return [*changed]
    is_shared = "_target_" in (node or {})
    own = f"optim.{name}", "schedule" if is_shared else f"schedule.{name}"
    return [key for key in changed if covers(own, key)]


def _keys_of_rules(node: Any, *, is_in_rules: bool = False) -> set[str]:
    """Return the keys inside all `rules` of a node, which may be mappings or lists."""
    if isinstance(node, Mapping):
        found = set(map(str, node)) if is_in_rules else set()
        parts = ((value, is_in_rules or key == "rules") for key, value in node.items())
    elif isinstance(node, list | tuple):
        found, parts = set(), ((value, is_in_rules) for value in node)
    else:
        return set()
    return found.union(*(_keys_of_rules(value, is_in_rules=inside) for value, inside in parts))


def _positions(state: Mapping[str, Any], changes: Iterable[_Change]) -> dict[str, Any]:
    """Return the saved states of the schedules; those that start again have a new one's."""
    positions = {}
    for hook, saved in state.get("schedule", {}).items():
        for change in changes:
            if change.restarts:
                saved = {**saved, change.name: change.start} if change.name else change.start
        positions[hook] = saved
    return positions


class _Change:
    """New settings of one optimizer and its schedule, kept while a checkpoint is loaded.

    Attributes:
        name: of the optimizer.
        restarts: whether the schedule goes from its start to the iteration, with new settings.
        start: its state at iteration 0.
    """

    def __init__(
        self,
        trainer: Trainer,
        name: str,
        optimizer: Optimizer,
        schedule: TorchScheduler,
        changed: Sequence[str],
        by_rules: Iterable[str],
    ) -> None:
        self.name, self._trainer, self._changed = name, trainer, changed
        self._optimizer, self._schedule = optimizer, schedule
        self.start = copy.deepcopy(schedule.state_dict())  # at iteration 0
        self._groups = [
            {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
            for group in optimizer.param_groups
        ]
        self._keys = _group_keys(changed, self._groups, by_rules)
        self.restarts = "lr" in self._keys and not isinstance(schedule, ReduceLROnPlateau)

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise ConfigError if the checkpoint groups the parameters in another way."""
        saved = state["optimizer"].get(self.name, {}) if self.name else state["optimizer"]
        there = [len(group["params"]) for group in saved.get("param_groups", ())]
        here = [len(group["params"]) for group in self._optimizer.param_groups]
        if there != here:
            expected = f"parameter groups of {there} tensors, as in the checkpoint, not of {here}"
            fix = "equal settings share a group: change those of a whole group alike"
            raise ConfigError(f"{self._changed[0]}: expected {expected}; {fix}")

    def apply(self, state: Mapping[str, Any]) -> None:
        """Give the loaded optimizer and schedule the new settings."""
        schedule, groups = self._schedule, self._optimizer.param_groups
        rates = [float(group["lr"]) for group in groups]
        for group, settings in zip(groups, self._groups, strict=True):
            for key in self._keys & settings.keys():
                _set(group, key, settings[key])
        is_stepped = any(hook.part == "schedule" for hook in self._trainer.hooks.values())
        if "lr" not in self._keys or not is_stepped:
            return
        iteration = int(state["stream"]["iteration"])
        if isinstance(schedule, ReduceLROnPlateau):
            _continue_plateau(schedule, self.start, self._changed)
            factor = _factor(self.name, state["settings"], self._trainer.settings)
            for group, rate in zip(groups, rates, strict=True):
                _set(group, "lr", rate * factor)
        elif isinstance(schedule, WarmupLR):
            schedule.step(iteration)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Detected call of")  # no update is made
                for _ in range(iteration):
                    schedule.step()


def _group_keys(
    changed: Iterable[str], groups: Sequence[Mapping[str, Any]], by_rules: Iterable[str]
) -> set[str]:
    """Return the keys of parameter groups whose values come from the new configuration.

    Args:
        changed: dotted keys of the configuration.
        groups: of the new optimizer.
        by_rules: keys that rules set, before or now.
    """
    names: set[str] = set()
    for key in changed:
        last = key.rpartition(".")[2]
        if covers(("schedule",), key) or last in _RATE_KEYS:
            names |= _RATES
            if "max_momentum" in groups[0]:
                names |= _CYCLED
        elif last in _DECAY_KEYS:
            names.add("weight_decay")
        elif any(last in group for group in groups):
            names.add(last)
        else:  # which parameters a rule matches, or a whole list of rules
            names |= {*_RATES, "weight_decay", *by_rules}
    return names


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group.get(key), Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def _continue_plateau(
    schedule: ReduceLROnPlateau, built: Mapping[str, Any], changed: Iterable[str]
) -> None:
    """Give a schedule that waits for a metric its new settings; its counters are kept."""
    for key in changed:
        name = key.rpartition(".")[2].replace("min_lr", "min_lrs")
        if covers(("schedule",), key) and name in built:
            setattr(schedule, name, built[name])


def _factor(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> float:
    """Return an optimizer's new `lr` as a multiple of the saved one."""
    old, new = ((each["optim"] or {}) for each in (before, now))
    if name:
        old, new = old[name], new[name]
    return float(new.get("lr", 1.0)) / (float(old.get("lr", 1.0)) or 1.0)

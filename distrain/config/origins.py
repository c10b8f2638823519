"""Origin of a composed configuration's keys: refuse or repair Hydra's silent merges.

- A file with the name of a file of distrain is never read: refused.
- A file without `# @package _global_` puts its keys below its own group: refused.
- An optimizer or a schedule given by import path is merged over the keywords that a group file has
  for another one: those that it does not take are dropped. Keys of the user's files and of the
  command line are kept, and checked where they are used.
- A group that was left out (`~optim`) loses the keys that an experiment has for it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra._internal.defaults_list import create_defaults_list
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from distrain.config.import_path import locate
from distrain.config.instantiate import keywords_of
from distrain.config.keys import Keys, OptimKeys
from distrain.errors import ConfigError

_CONF = Path(__file__).parents[1] / "conf"
# Hydra stops looking for it at the first line that is neither blank nor `# @...`
_PACKAGE = re.compile(r"\A(\s*#\s*@.*\n|\s*\n)*\s*#\s*@package\b")
_TARGET_KEY = {"optim": "target", "schedule": "_target_"}


class _Part(NamedTuple):
    """One file of the defaults list, such as `optim/sgd`, and the keys that it sets."""

    name: str
    is_ours: bool
    keys: DictConfig


def clean(cfg: DictConfig, hydra_conf: Any) -> DictConfig:
    """Remove keys of left-out groups and other targets from `cfg`, in place; return it.

    Raises:
        ConfigError: a file of the user is shadowed, or its keys are below its own group.
    """
    # not resolved: an override may be `seed=${vars.seed}`
    given: Any = OmegaConf.to_container(hydra_conf.overrides, resolve=False)
    overrides = given["task"]
    folders = [source.path for source in hydra_conf.runtime.config_sources]
    for group, choices in hydra_conf.runtime.choices.items():
        for choice in choices if isinstance(choices, ListConfig) else [choices]:
            if choice is not None and not group.startswith("hydra/"):
                _check_file(group.partition("@")[0], choice, folders)
    with open_dict(cfg):
        for group, target_key in _TARGET_KEY.items():
            target = OmegaConf.select(cfg, f"{group}.{target_key}")
            choice = hydra_conf.runtime.choices.get(group)
            if _is_left_out(group, overrides):
                cfg[group] = None
            elif target is not None and (
                _was_chosen(group, overrides) or target != _own_target(group, choice, target_key)
            ):
                parts = list(_parts(hydra_conf.job.config_name, given["hydra"] + overrides))
                _drop_keywords_of_others(cfg[group], group, target_key, parts, overrides)
    return cfg


def _check_file(group: str, choice: str, folders: Sequence[str]) -> None:
    """Raise ConfigError for a file that is never read, or whose keys are below its own group."""
    own = [Path(folder, group, f"{choice}.yaml") for folder in folders if "://" not in folder]
    own = [path for path in own if path.is_file()]
    if not own:
        return
    is_after_ours = "distrain.conf" in folders and folders.index("distrain.conf") < folders.index(
        str(own[0].parents[group.count("/") + 1])
    )
    if is_after_ours and (_CONF / group / f"{choice}.yaml").is_file():
        raise ConfigError(
            f"{group}={choice}: {own[0]} is shadowed by distrain's own file of the same name; "
            "rename it"
        )
    known = [field.name for field in dataclasses.fields(Keys)]
    if group not in known and not _PACKAGE.match(own[0].read_text()):
        raise ConfigError(
            f"{group}={choice}: the keys of {own[0]} are below {group}.; expected "
            "'# @package _global_' as its first line"
        )


def _own_target(group: str, choice: Any, target_key: str) -> Any:
    """Return the target in distrain's file of a choice, or None."""
    path = _CONF / group / f"{choice}.yaml"
    keys = yaml.safe_load(path.read_text()) if path.is_file() else {}
    return keys.get(target_key)


def _parts(config_name: str, overrides: Sequence[str]) -> Iterator[_Part]:
    """Yield the files of the defaults list in the order of their merge."""
    loader: Any = GlobalHydra.instance().config_loader()
    # private, but the only repository that also searches the folders of hydra.searchpath
    parsed, repo = loader._parse_overrides_and_create_caching_repo(config_name, list(overrides))
    found = create_defaults_list(repo, config_name, parsed, prepend_hydra=True, skip_missing=False)
    for default in found.defaults:
        name = default.config_path
        if name is not None and not name.startswith("hydra/"):
            result = repo.load_config(name)
            embedded = loader._embed_result_config(result, default.package).config
            yield _Part(name, result.path.startswith("pkg://distrain.conf"), embedded)


def _was_chosen(group: str, overrides: Sequence[str]) -> bool:
    return any(override.startswith(f"{group}=") for override in overrides)


def _is_left_out(group: str, overrides: Sequence[str]) -> bool:
    """Whether `~group` is the last override of a group."""
    own = [each for each in overrides if each.lstrip("+~").partition("=")[0].split(".")[0] == group]
    return bool(own) and own[-1].partition("=")[0] == f"~{group}"


def _drop_keywords_of_others(
    node: DictConfig,
    group: str,
    target_key: str,
    parts: Sequence[_Part],
    overrides: Sequence[str],
) -> None:
    """Drop keywords that distrain's files set for another target and this one does not take."""
    final, target = node[target_key], None
    is_chosen = _was_chosen(group, overrides)
    target_of: dict[str, Any] = {}  # key -> the target for which it was set
    for part in parts:
        keys = OmegaConf.select(part.keys, group)
        if not isinstance(keys, DictConfig):
            continue
        target = keys.get(target_key, target)
        of = target
        if not part.name.startswith(f"{group}/"):
            of = final if not part.is_ours else None if is_chosen else target
        target_of |= {str(key): of for key in keys}
    for override in overrides:
        path = override.lstrip("+~").partition("=")[0].split(".")
        if path[0] == group and len(path) > 1:
            target_of[path[1]] = final
    service = {field.name for field in dataclasses.fields(OptimKeys)}
    others = {
        key
        for key, of in target_of.items()
        if of != final and key in node and not (group == "optim" and key in service)
    }
    if not others:
        return
    try:
        takes = keywords_of(locate(str(final)))
    except ConfigError:  # the submitting node may lack packages of the ranks, which check it
        return
    if takes is not None:
        for key in others.difference(takes):
            del node[key]

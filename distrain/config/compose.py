"""Composed configuration -> checked plain values; Hydra's errors in one line.

Configuration is trusted like code: `_target_` may name any importable callable. Treat the
`run.yaml` of a stranger like a script of theirs.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distrain.checks import number, parsed_number, wrong
from distrain.config import check_keys
from distrain.config.import_path import locate
from distrain.config.instantiate import build
from distrain.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = ["build", "experiments", "explain", "locate", "resolve"]


def resolve(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Return the composed configuration as checked plain values, interpolations resolved.

    Raises:
        ConfigError: a key is unknown, missing, of a wrong type or out of range.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    composed = cfg if isinstance(cfg, DictConfig) else OmegaConf.create(dict(cfg))
    if OmegaConf.select(composed, "model") is None:
        raise ConfigError("nothing to train: give an experiment, " + experiments())
    _set_max_iter(composed)
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise explain(error) from error
    assert isinstance(plain, dict)
    return check_keys.check({str(key): value for key, value in plain.items()})


def _set_max_iter(composed: DictConfig) -> None:
    """Set `trainer.max_iter` to the text of `trainer.max_epochs`, if given."""
    from omegaconf import OmegaConf

    epochs = OmegaConf.select(composed, "trainer.max_epochs")
    if epochs is None:
        return
    number("trainer.max_epochs", parsed_number(epochs), above=0.0)
    max_iter = OmegaConf.select(composed, "trainer.max_iter")
    if max_iter is not None:
        expected = f"trainer.max_iter=null with it, but that is {max_iter}"
        raise wrong("trainer.max_epochs", epochs, expected)
    # before interpolation: ${trainer.max_iter} of a schedule gets the text, too
    OmegaConf.update(composed, "trainer.max_iter", f"{epochs} epochs", force_add=True)


def experiments() -> str:
    """Return `+experiment=` with the available experiments, for an error message."""
    return "+experiment=" + ("|".join(_options("experiment")) or "NAME")


def explain(error: Exception) -> ConfigError:
    """Return an error of Hydra, OmegaConf or the YAML reader in one line, with its fix."""
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, ConfigError):
        return error
    if isinstance(error, UnicodeDecodeError) and (place := _place_of(error)):
        return ConfigError(f"{place}: expected a file in UTF-8")
    text = str(error) or str(error.__cause__ or type(error).__name__)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = list(error.options or _options(group))
        if group:
            hint = f"{_all_of(choice, options)}; {_folders(text)}"
            return ConfigError(f"{group}={choice}: no such choice; {hint}")
        return ConfigError(f"--config-name={choice}: no such file in the folders searched")
    if isinstance(error, OverrideParseException):
        why = _unreadable(str(error.override), text)
        return ConfigError(f"cannot read {error.override!r}: {why}")
    if text.startswith("Config group override must be a string"):
        if text.endswith("NoneType"):
            return ConfigError("a group cannot be null; expected ~GROUP, as in ~schedule")
        fix = "put one that looks like a number or a bool in quotes, as '+experiment=\"42\"'"
        return ConfigError(f"the choice of a group: expected a name; {fix}")
    cause = error if hasattr(error, "full_key") else error.__cause__
    key = str(getattr(cause, "full_key", "") or "")
    if key and text.startswith("Could not override"):
        near = _near_key(cause, key)
        add = f"+{key}=... adds it"
        if key.endswith("._target_"):  # of a node that is null: a whole one takes its place
            node = key.removesuffix("._target_")
            add = f"'{node}={{_target_: ...}}' or +{key}=... sets it"
        return ConfigError(f"{key}: no such key; " + (f"{near} ({add})" if near else add))
    if key and text.startswith("Missing mandatory value"):
        return ConfigError(f"{key}: expected a value, {key}=...")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("full_key:", "object_type="))]
    line = "; ".join(lines)
    return ConfigError(f"{key}: {line}" if key and key not in line else line)


def _place_of(error: UnicodeDecodeError) -> str | None:
    """Return the file and line that Hydra could not decode, None if unknown: it names neither."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    paths = [frame.f_locals["full_path"] for frame in frames if "full_path" in frame.f_locals]
    if not paths:
        return None
    lines = Path(paths[-1]).read_bytes().splitlines()
    # the error's position counts from the start of a block of the file
    bad = [number for number, line in enumerate(lines, 1) if not _is_utf_8(line)]
    return f"{paths[-1]}, line {bad[0]}" if bad else str(paths[-1])


def _is_utf_8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _unreadable(override: str, text: str) -> str:
    """Return why Hydra's grammar of overrides refuses one, and how to write it."""
    key, equals, value = override.partition("=")
    if quoted_key := re.search(r"""[{,]\s*(["'][^"']+["'])\s*:""", value):
        place = f"{quoted_key[1]}: ... below {key.lstrip('+')} in the experiment"
        return f"a key in quotes is read in YAML files only; write {place}"
    quoted = repr(f'{key}="..."')
    fix = f"put a text in quotes, as {quoted}" if equals else "expected key=value"
    return f"{text.splitlines()[0]}; {fix}"


def _options(group: str) -> list[str]:
    """Return the choices of a config group; none if Hydra is not running."""
    from hydra.core.global_hydra import GlobalHydra

    if not group or not GlobalHydra.instance().is_initialized():
        return []
    return list(GlobalHydra.instance().config_loader().get_group_options(group))


def _folders(text: str) -> str:
    """Return the user's folders in the text of Hydra's error."""
    own = re.findall(r"path=file://(.*)", text)
    return "also searched: " + ", ".join(own) if own else "--config-dir FOLDER adds your files"


def _all_of(word: str, options: list[str]) -> str:
    """Return the choice spelled like `word`, if any, then all choices."""
    near = difflib.get_close_matches(word, options, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return hint + "available: " + (", ".join(sorted(options)) or "none")


def _near_key(cause: object, key: str) -> str:
    """Return a hint with the keys spelled like an unknown one, else all in its node."""
    parent, _, last = key.rpartition(".")
    node = getattr(cause, "parent_node", None)
    names = sorted(str(name) for name in node) if isinstance(node, Mapping) else []
    near = difflib.get_close_matches(last, names, n=3)
    found = [f"{parent}.{name}" if parent else name for name in near or names]
    if near:
        return "did you mean " + " or ".join(found) + "?"
    return "available: " + ", ".join(found) if found else ""

"""Mask passwords, tokens and other secrets, recognised by their keys, in output and files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

MASK = "***"

_SECRET = re.compile(
    r"(^|_)(password|passwd|passphrase|secret|api_?key|access_key|private_key|credentials?)(_|$)"
)
# `token` and `auth` are not always secret: pad_token, token_dropout, auth: true
_SECRET_TEXT = re.compile(r"(^|_)(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)(?<!cls_)(?<!sep_)(?<!mask_)"
                          r"(token$|auth(_|$)|authorization(_|$))")  # fmt: skip
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_VALUE = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\$\\?\{[^}]*\}|[^\s,{}\[\])'\"][^\s,}\])'\"]*"
_PAIR = re.compile(rf"([\w.\-]+)(=|(?<=\w)['\"]?\s*:\s*)({_VALUE})")
# ${oc.env:NAME} is only a reference; Hydra hands the runs of a sweep $\{oc.env:NAME\}
_LOOKED_UP = re.compile(r"['\"]?\$\\?\{[^{}]*\}['\"]?")


def is_secret(key: str, value: Any = "") -> bool:
    """Return whether the value of a dotted key must be masked; None and bools are no secrets.

    Example: `hooks.tracker.api_key` and `data.hf_token` are, `max_tokens` and `tokenizer` are not.
    """
    if value is None or isinstance(value, bool):
        return False
    for part in key.split("."):
        name = _HUMP.sub("_", part).replace("-", "_").lower()
        if _SECRET.search(name) or (isinstance(value, str) and _SECRET_TEXT.search(name)):
            return True
    return False


def masked(node: Any, key: str = "") -> Any:
    """Return a configuration with its secrets, and those in URLs, masked; tuples become lists."""
    if isinstance(node, Mapping):
        return {k: masked(v, f"{key}.{k}" if key else str(k)) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [masked(each, key) for each in node]
    if is_secret(key, node):
        return MASK
    return _URL.sub(MASK, node) if isinstance(node, str) else node


def masked_overrides(argv: Iterable[str]) -> list[str]:
    """Return arguments with their secrets masked; `${oc.env:NAME}` stays."""
    shown = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        if equals and is_secret(key.lstrip("+~"), value) and not _LOOKED_UP.fullmatch(value):
            shown.append(f"{key}={MASK}")
        else:
            shown.append(masked_text(argument))
    return shown


def masked_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text with its secrets masked: `secrets`, `key=value`, `key: value`, in URLs."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, MASK)

    def hide(match: re.Match[str]) -> str:
        key, sign, value = match.groups()
        # nothing is masked in a message about a key: `api_key: expected a text`
        is_message = ":" in sign and not value.startswith(("'", '"')) and "{" not in text
        if is_message or not is_secret(key, value):
            return f"{key}{sign}{_PAIR.sub(hide, value)}"  # as in `cannot log in: password=...`
        if _LOOKED_UP.fullmatch(value):
            return match[0]
        return f"{key}{sign}{MASK}"

    return _URL.sub(MASK, _PAIR.sub(hide, text))


def secrets_of(argv: Iterable[str], conf: Mapping[str, Any] | None = None) -> set[str]:
    """Return the secrets of at least 4 characters in arguments and in a configuration."""
    found: set[str] = set()
    for argument in argv:
        key, _, value = argument.partition("=")
        if is_secret(key.lstrip("+~"), value) and not _LOOKED_UP.fullmatch(value):
            found |= {value, value.strip("'\"")}
    pending: list[tuple[str, Any]] = [("", conf or {})]
    while pending:
        key, node = pending.pop()
        if isinstance(node, Mapping):
            pending += [(f"{key}.{k}" if key else str(k), v) for k, v in node.items()]
        elif isinstance(node, list | tuple):
            pending += [(key, each) for each in node]
        elif is_secret(key, node):
            found.add(str(node))
    return {each for each in found if len(each) >= 4}

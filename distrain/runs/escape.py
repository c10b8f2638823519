"""Escape control and direction characters of untrusted text for a terminal."""

from __future__ import annotations


def escaped(text: str) -> str:
    r"""Return a text as one line of printable characters. Example: an escape becomes `\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def escaped_lines(text: str) -> str:
    """Return a text with each of its lines escaped; tabs become spaces."""
    return "\n".join(escaped(line.expandtabs()) for line in text.splitlines())

"""Making hostile text harmless on a terminal."""

from __future__ import annotations

import unicodedata


def inert(text: str) -> str:
    """Return the text with everything that could steer a terminal or reorder a line shown as its escape.

    That is every control and format character (categories Cc, Cf, Co, Cs and the line separators): escape
    sequences, bidirectional overrides, zero-width ones.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == " " else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if unicodedata.category(character) == "Zs":  # the spaces that isprintable() doesn't count
        return " "
    return character.encode("unicode_escape").decode("ascii", "backslashreplace")

"""Names and texts of users, as they may be printed: a terminal or a CI system would take some of them for commands."""

from __future__ import annotations

import re

# What moves the cursor, changes colours or titles, or reverses the direction of text; surrogates cannot be encoded.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What GitHub takes for a command where a line begins with it, blanks or not.
_COMMAND = re.compile(r"^([ \t]*)(::|##\[)", re.MULTILINE)


def printable(text: str) -> str:
    """Return text with control characters made visible (``\\x1b``); line breaks and tabs are kept.

    A line that a CI system would run as a command, ``::error::``, begins with a backslash.
    """
    return _COMMAND.sub(r"\1\\\2", _CONTROL.sub(lambda found: _visible(found[0]), text))


def one_line(text: str) -> str:
    """Return text on one line, as `printable`: a name with a line break must not begin a line of its own."""
    return printable(" ".join(text.split()))


def encodable(text: str) -> str:
    """Return text that UTF-8 can represent: halves of characters are made visible."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _visible(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"

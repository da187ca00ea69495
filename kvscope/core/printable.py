"""Names and texts of users, as they may be printed: a terminal or a CI system would take some of them for commands."""

from __future__ import annotations

import re

# What moves the cursor, changes colours or titles, or reverses the direction of text; surrogates cannot be encoded.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What GitHub runs where a line begins with it, after blanks of any kind. Lines are wrapped anywhere, so that a command
# of a known name may come to begin one.
_AT_START = re.compile(r"^([^\S\n]*):(?=:)", re.MULTILINE)
_ANYWHERE = re.compile(
    r":(?=:(?:add-mask|add-matcher|add-path|debug|echo|endgroup|error|group|notice|remove-matcher|save-state|set-env"
    r"|set-output|stop-commands|warning)\b[^\n]*::)",
    re.IGNORECASE,
)
# What GitHub and Azure run wherever it stands in a line, and TeamCity at its beginning.
_HASHES = re.compile(r"##(?=(?:vso|teamcity)?\[)")


def printable(text: str) -> str:
    """Return text with control characters made visible (``\\x1b``); line breaks and tabs are kept.

    What a CI system would run as a command, ``::error::`` or ``##[error]``, has a backslash in it: ``:\\:error::``.
    """
    shown = _CONTROL.sub(lambda found: _visible(found[0]), text)
    for pattern, inert in ((_AT_START, r"\1:\\"), (_ANYWHERE, r":\\"), (_HASHES, r"#\\#")):
        shown = pattern.sub(inert, shown)
    return shown


def in_json(text: str) -> str:
    """Return JSON that says the same, without control characters, and without what a CI system would run."""
    escaped = _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    return _HASHES.sub(r"#\\u0023", escaped)


def one_line(text: str) -> str:
    """Return text on one line, as `printable`: a name with a line break must not begin a line of its own."""
    return printable(" ".join(text.split()))


def encodable(text: str) -> str:
    """Return text that UTF-8 can represent: halves of characters are made visible."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _visible(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"

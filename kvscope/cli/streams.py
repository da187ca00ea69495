"""Standard streams that may be closed, and text that a terminal would take for a command."""

from __future__ import annotations

import io
import os
import re
import sys

# What moves the cursor, changes colours or titles, or reverses the direction of text; surrogates cannot be encoded.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def open_streams() -> None:
    """Make stdin, stdout and stderr usable: a closed one discards, and every character can be written.

    A descriptor below 3 that is closed would be given to the next file that is opened, and messages written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            _to_nowhere(number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # ASCII and Latin-1 have no boxes, and tokens may be anything


def discard_stdout() -> None:
    """Let what is still buffered for stdout be discarded: its reader has closed it, or its disk is full."""
    os.closerange(sys.stdout.fileno(), sys.stdout.fileno() + 1)  # one more is needed where no more can be opened
    _to_nowhere(sys.stdout.fileno())


def printable(text: str) -> str:
    """Return text with control characters made visible (``\\x1b``); line breaks and tabs are kept."""
    return _CONTROL.sub(lambda found: _visible(found[0]), text)


def one_line(text: str) -> str:
    """Return text on one line, as `printable`: a name with a line break must not begin a line of its own."""
    return printable(" ".join(text.split()))


def _visible(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)

"""Standard streams that may be closed, or that cannot encode every character."""

from __future__ import annotations

import io
import os
import sys


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


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)

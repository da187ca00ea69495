"""Names of text files: what an output is called by default, after the file that it was made from."""

from __future__ import annotations

from pathlib import Path

STANDARD_INPUT = "-"
COMPRESSED = (".gz", ".zst", ".zstd")


def text_name(file: Path | str) -> str:
    """Return the name of a text file without folder and endings; ``stdin`` for ``-``.

    >>> text_name("data/qa.jsonl.gz"), text_name("-")
    ('qa', 'stdin')
    """
    if str(file) == STANDARD_INPUT:
        return "stdin"
    path = Path(file)
    return path.with_suffix("").stem if path.suffix.lower() in COMPRESSED else path.stem


def text_ending(file: Path | str) -> str:
    """Return the ending of a text file in lower case, without that of a compressed file: ``.jsonl``; may be empty."""
    path = Path(file)
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSED else path).suffix.lower()

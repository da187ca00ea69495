"""Read text files: UTF-8, plain or compressed with gzip or zstd, from a path or from standard input."""

from __future__ import annotations

import gzip
import io
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa

from kvscope.core.errors import UsageError
from kvscope.core.text_names import COMPRESSED, STANDARD_INPUT

GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # the first bytes of compressed files
BOM = "\ufeff"
# A text becomes some ten times smaller, up to fifty if it repeats itself; a file that was made to exceed memory, a
# thousand times.
MOST_RATIO, ALWAYS_ALLOWED = 100, 64 * 2**20


def read_text(file: Path | str) -> str:
    """Return the text of a file, without a byte order mark and with line ends as ``\\n``; ``-`` is standard input.

    Raises
    ------
    UsageError
        If the file cannot be read or decompressed, or is not UTF-8 text.
    """
    return read_exactly(file).replace("\r\n", "\n").replace("\r", "\n")


def read_exactly(file: Path | str) -> str:
    """Return the text of a file, without a byte order mark and with its own line ends; errors as `read_text`."""
    name = file_name(file)
    content = _decompressed(name, _read_bytes(file), Path(file).suffix.lower())
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{name} is not UTF-8 text", "Name a text file, or convert it to UTF-8.") from error
    if "\0" in text:
        raise UsageError(f"{name} is not a text: it contains zero bytes", "Name a text file, or convert it to UTF-8.")
    return text.lstrip(BOM)


def file_name(file: Path | str) -> str:
    """Return a file's name for messages."""
    return "standard input" if str(file) == STANDARD_INPUT else str(file)


def require_one_input(files: Iterable[Path | str]) -> None:
    """Raise UsageError if standard input is named twice: it can be read once."""
    if sum(str(file) == STANDARD_INPUT for file in files) > 1:
        raise UsageError("standard input (-) is named twice", "It can be read once: write - once.")


def require_whole(name: str, text: str) -> None:
    """Raise UsageError if a text contains half a character, a lone surrogate, which UTF-8 cannot represent."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} contains half a character: {text[error.start]!a}",
            "Write both halves of the surrogate pair, or remove it.",
        ) from None


def _read_bytes(file: Path | str) -> bytes:
    if str(file) == STANDARD_INPUT:
        return sys.stdin.buffer.read()
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", "Name a text file that exists.") from error


def _decompressed(name: str, content: bytes, ending: str) -> bytes:
    """Return the content of a file, decompressed if its first bytes say that it is compressed."""
    try:
        if content.startswith(GZIP):
            with gzip.GzipFile(fileobj=io.BytesIO(content)) as unpacked:
                return _within_limit(name, unpacked.read, len(content))
        if content.startswith(ZSTD):
            with pa.input_stream(pa.BufferReader(content), compression="zstd") as stream:
                return _within_limit(name, stream.read, len(content))
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise UsageError(f"{name} is damaged: it cannot be decompressed", "Write it again.") from error
    if content and ending in COMPRESSED:
        raise UsageError(f"{name} is not compressed, although its name ends in {ending}", "Correct its name.")
    return content


def _within_limit(name: str, read: Callable[[int], bytes], size: int) -> bytes:
    """Return what a stream of `size` compressed bytes holds; raises UsageError if no text becomes so small."""
    limit = max(ALWAYS_ALLOWED, MOST_RATIO * size)
    parts, left = [], limit + 1
    while left and (part := read(min(left, ALWAYS_ALLOWED))):
        parts.append(bytes(part))
        left -= len(part)
    if not left:
        raise UsageError(
            f"{name} is not a text: decompressed, it has more than {MOST_RATIO} times its size",
            "Decompress it, then name the decompressed file.",
        )
    return b"".join(parts)

"""Copy bytes of a stream into a file while they are counted and hashed: nothing that differs is kept as whole."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from kvscope.core.errors import KvscopeError, ShareError
from kvscope.core.output import size
from kvscope.sharing.kinds import SharedFile

PIECE = 2**20  # bytes copied at a time
Progress = Callable[[int], None]  # called with the number of bytes that were copied since the last call
Fault = Callable[[str], KvscopeError]  # returns the error from what is wrong


class Readable(Protocol):
    """A stream of bytes."""

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end."""


class Hashed:
    """A stream of bytes and the SHA-256 of what has been read of it."""

    def __init__(self, stream: Readable) -> None:
        self._stream, self._sum = stream, hashlib.sha256()
        self.bytes = 0

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes; none at the end."""
        piece = self._stream.read(size)
        self._sum.update(piece)
        self.bytes += len(piece)
        return piece

    @property
    def sha256(self) -> str:
        """SHA-256 of all that was read, in hexadecimal."""
        return self._sum.hexdigest()


def read_up_to(stream: Readable, count: int) -> bytes:
    """Return the next `count` bytes of a stream, fewer only at its end: a network gives them in pieces."""
    pieces, missing = [], count
    while missing and (piece := stream.read(min(missing, PIECE))):
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def copy_file(stream: Readable, target: Path, file: SharedFile, fault: Fault, progress: Progress) -> None:
    """Write the next bytes of a stream to `target`.

    Raises
    ------
    KvscopeError
        What `fault` returns, if the stream ends before the recorded size, or its bytes have another SHA-256.
    OSError
        If `target` cannot be written.
    """
    total, missing = hashlib.sha256(), file.bytes
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as output:
        while missing:
            piece = stream.read(min(missing, PIECE))
            if not piece:
                raise fault(f"{file.name} ends after {file.bytes - missing} of {file.bytes} bytes")
            output.write(piece)
            total.update(piece)
            missing -= len(piece)
            progress(len(piece))
    if total.hexdigest() != file.sha256:
        raise fault(f"the checksum of {file.name} differs from the recorded one")


def require_room(folder: Path, needed: int, todo: str) -> None:
    """Raise ShareError if the disk of a folder that exists has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ShareError(f"{size(needed)} are needed, and the disk of {folder} has {size(free)} free", todo)


def no_progress(count: int) -> None:
    """Show nothing."""

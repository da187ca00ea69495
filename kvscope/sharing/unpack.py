"""Read a packed file: every byte is checked, and only what is whole gets a name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from kvscope.core.errors import KvscopeError, ShareError
from kvscope.core.output import OutputFolder
from kvscope.sharing.archive import (
    BLOCK,
    END,
    LIST,
    LIST_BYTES,
    PACK,
    PackRecord,
    fault_of_header,
    list_bytes,
    padding,
    require_order,
    size_of_list,
)
from kvscope.sharing.copying import Hashed, Progress, Readable, copy_file, no_progress, read_up_to, require_room
from kvscope.sharing.kinds import HEADER_BYTES, KINDS, Kind


class PackedFile:
    """A packed file that is read in one pass: its list at once, then the header, then the other files.

    Parameters
    ----------
    stream : Readable
        Its bytes, from the first on.
    name : str
        What it is called in messages.

    Attributes
    ----------
    record : PackRecord
        Its list.
    kind : Kind
        What is packed in it.

    Raises
    ------
    ShareError
        If it is not a packed file, or its list is damaged.
    """

    def __init__(self, stream: Readable, name: str) -> None:
        self._stream, self.name = Hashed(stream), name
        self.record = self._read_list()
        self.kind: Kind = KINDS[self.record.content]
        fault = require_order(self.record.files, self.kind.header)
        if fault is not None:
            raise self.damaged(fault)
        for file in self.record.files:
            self.kind.require_member(file.name, name)
        if self.record.files[0].bytes > HEADER_BYTES:
            raise self.damaged(f"{self.kind.header} has {self.record.files[0].bytes} bytes: too many")

    @property
    def sha256(self) -> str:
        """SHA-256 of what was read so far; after `copy_to`, of the whole file."""
        return self._stream.sha256

    def copy_to(self, folder: Path, progress: Progress = no_progress) -> None:
        """Write everything into an empty folder, its header last, and check the folder.

        Raises
        ------
        ShareError
            If the file is cut off, changed, or has more than its list says.
        KvscopeError
            If what was packed is damaged, or the disk has too little space.
        OSError
            If the folder cannot be written.
        """
        header = self._header()
        require_room(folder.parent, self.record.bytes, "Free some space, or write to another disk.")
        for file in self.record.files[1:]:
            self._require_header(file.name, file.bytes)
            copy_file(self._stream, folder / file.name, file, self.damaged, progress)
            self._require_same(padding(file.bytes), f"{file.name} is not followed by zero bytes")
        self._require_same(END, "it does not end with zero bytes")
        if self._stream.read(1):
            raise self.damaged("it goes on after its end")
        (folder / self.kind.header).write_bytes(header)
        try:
            self.kind.open(folder)
        except KvscopeError as error:
            raise ShareError(f"{self.name} has a damaged {self.kind.noun}: {error.what}", PACK.again) from error

    def damaged(self, why: str) -> ShareError:
        """Return the error for a damaged file."""
        return ShareError(f"{self.name} is damaged: {why}", PACK.again)

    def _read_list(self) -> PackRecord:
        first = read_up_to(self._stream, BLOCK)
        size = size_of_list(first)
        if size is None:
            raise ShareError(f"{self.name} is not a packed file", "Name one that kvscope pack wrote.")
        if size > LIST_BYTES:
            raise self.damaged(f"its list has {size} bytes: too many")
        content = read_up_to(self._stream, size)
        if len(content) < size:
            raise self.damaged(f"it ends in {LIST}")
        self._require_same(padding(size), f"{LIST} is not followed by zero bytes")
        data = PACK.header_of(content, self.name, example="Name one that kvscope pack wrote.")
        record = PACK.decode(data, self.name, PackRecord)
        if list_bytes(record) != content:
            raise self.damaged(f"{LIST} was changed since it was written")
        return record

    def _header(self) -> bytes:
        """Return the header of what is packed, which lists the same files as the packed file."""
        first = self.record.files[0]
        self._require_header(first.name, first.bytes)
        content = read_up_to(self._stream, first.bytes)
        if len(content) < first.bytes:
            raise self.damaged(f"it ends in {first.name}")
        if hashlib.sha256(content).hexdigest() != first.sha256:
            raise self.damaged(f"the checksum of {first.name} differs from the recorded one")
        self._require_same(padding(first.bytes), f"{first.name} is not followed by zero bytes")
        if tuple(self.kind.files(content, self.name)) != self.record.files[1:]:
            raise self.damaged(f"its list is not that of {first.name}")
        return content

    def _require_header(self, name: str, size: int) -> None:
        fault = fault_of_header(read_up_to(self._stream, BLOCK), name, size)
        if fault is not None:
            raise self.damaged(fault)

    def _require_same(self, expected: bytes, fault: str) -> None:
        found = read_up_to(self._stream, len(expected))
        if found != expected:
            raise self.damaged("it is cut off" if len(found) < len(expected) else fault)


def unpack(packed: PackedFile, output: Path, *, force: bool = False, progress_callback: Progress = no_progress) -> Path:
    """Return the folder into which a packed file was written; it gets its name when all of it has been checked.

    Parameters
    ----------
    packed : PackedFile
        The file, of which the list alone has been read.
    output : Path
        The folder to write.
    force : bool
        Whether an existing trace or replay is replaced, once this one is whole.
    progress_callback : callable
        Called with the number of bytes written since its last call.

    Raises
    ------
    KvscopeError
        If the file is damaged or what it holds is; if the output exists, or cannot be written. Nothing is left then.
    """
    kind = packed.kind
    folder = OutputFolder(output, kind.noun, kind.header, kind.members, kind.error, force)
    try:
        writer = folder.begin()
        with folder.abandoned_on_error():
            unfinished = {"kind": kind.noun, "complete": False, "writer": writer}
            (folder.work / kind.header).write_text(json.dumps(unfinished), encoding="utf-8")
            packed.copy_to(folder.work, progress_callback)
            folder.finish()
    except OSError as error:
        raise folder.unwritable(error) from error
    return output

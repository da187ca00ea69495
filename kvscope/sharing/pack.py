"""Write a trace or a replay into one file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kvscope.core.errors import ShareError
from kvscope.core.output import require_free
from kvscope.core.written import written_file
from kvscope.sharing.archive import END, LIST, PackRecord, list_bytes, padding, tar_header
from kvscope.sharing.copying import PIECE, Progress, no_progress, require_room
from kvscope.sharing.kinds import HEADER_BYTES, Kind, SharedFile


@dataclass(frozen=True)
class Packed:
    """A packed file.

    Attributes
    ----------
    path : Path
        The file.
    record : PackRecord
        What is in it.
    bytes : int
        Its size.
    sha256 : str
        SHA-256 of the whole file, as ``sha256sum`` prints it.
    """

    path: Path
    record: PackRecord
    bytes: int
    sha256: str


def pack(
    folder: Path, kind: Kind, output: Path, *, force: bool = False, progress_callback: Progress = no_progress
) -> Packed:
    """Return the file into which a trace or a replay was packed; the same content gives the same bytes.

    Parameters
    ----------
    folder : Path
        The trace or replay. Its files are compared with their recorded checksums while they are packed.
    kind : Kind
        Which of the two it is.
    output : Path
        The file to write.
    force : bool
        Whether an existing file is replaced.
    progress_callback : callable
        Called with the number of bytes packed since its last call.

    Raises
    ------
    KvscopeError
        If the folder is missing, incomplete or damaged; if the output exists, or the disk has too little space.
    OSError
        If the output cannot be written; nothing is left of it then.
    """
    require_free(output, force=force)
    kind.open(folder)
    header = (folder / kind.header).read_bytes()
    if len(header) > HEADER_BYTES:
        raise ShareError(f"{folder / kind.header} has {len(header)} bytes: too many", "Pack a trace of fewer prompts.")
    first = SharedFile(kind.header, len(header), hashlib.sha256(header).hexdigest())
    record = PackRecord(kind.noun, (first, *kind.files(header, str(folder))))
    with written_file(output) as stream:
        require_room(output.absolute().parent, record.bytes, "Free some space, or write to another disk with -o.")
        written = _Archive(stream)
        content = list_bytes(record)
        written.add(tar_header(LIST, len(content)) + content + padding(len(content)))
        for file in record.files:
            written.add(tar_header(file.name, file.bytes))
            _copy(folder / file.name, file, kind, written, progress_callback)
            written.add(padding(file.bytes))
        written.add(END)
    return Packed(output, record, written.bytes, written.sum.hexdigest())


class _Archive:
    """A file that is written, its size, and the SHA-256 of what was written."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.sum, self.bytes = stream, hashlib.sha256(), 0

    def add(self, piece: bytes) -> None:
        self._stream.write(piece)
        self.sum.update(piece)
        self.bytes += len(piece)


def _copy(path: Path, file: SharedFile, kind: Kind, written: _Archive, progress: Progress) -> None:
    """Copy a file of a folder; raise the error of its kind unless it is what was recorded."""
    total, count = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            written.add(piece)
            total.update(piece)
            count += len(piece)
            progress(len(piece))
    if count != file.bytes or total.hexdigest() != file.sha256:
        raise kind.error(
            f"{kind.noun} {path} is damaged: its checksum differs from the recorded one",
            "Make it again, or restore the file from a copy.",
        )

"""The format of a packed file: an uncompressed tar archive, every byte of which follows from the list at its beginning.

The archive holds ``kvscope-pack.json``, then the header of the trace or replay, then its other files by name, then
1,024 zero bytes. The list has the path, size and SHA-256 of each, and a checksum of itself. Everything else - the tar
headers, their order, dates, owners and padding - is the same for the same list: packing twice gives the same file, and
a file that differs in any byte is refused. So an archive cannot name a place outside the folder, hold a link or a
device, hold a file twice, or claim another size.

- tar, because it is read in one pass, from a network too, and ``tar -xf`` reads it where there is no kvscope;
- uncompressed, because Parquet files are compressed already (the example trace would become 9 % smaller), and an
  archive that is not compressed cannot expand: what it takes on a disk is known from its list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from kvscope.core.errors import ShareError
from kvscope.core.json_records import Format, about
from kvscope.sharing.kinds import Noun, SharedFile

ENDING = ".tar"
SUFFIX = f".kvscope{ENDING}"  # of the file that `kvscope pack` writes
LIST = "kvscope-pack.json"
LIST_BYTES = 2**24  # largest list that is read: room for some 100,000 files
BLOCK = 512  # everything in a tar archive begins at a multiple of this
END = bytes(2 * BLOCK)
VERSION = 1
HISTORY = {1: "first version"}
PACK = Format("kvscope-pack", "packed file", VERSION, ShareError, "Ask for the file again, or pack it again.")
_LARGEST_OCTAL = 8**11  # a size from here on is written in binary
_KINDS = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"5": "a folder", b"6": "a FIFO"}


@dataclass(frozen=True)
class PackRecord:
    """The content of ``kvscope-pack.json``."""

    content: Annotated[Noun, about("what is packed: `trace` or `replay`")]
    files: Annotated[tuple[SharedFile, ...], about("every other file of the archive, in order")]

    @property
    def bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.bytes for file in self.files)


def list_bytes(record: PackRecord) -> bytes:
    """Return the content of ``kvscope-pack.json``."""
    return PACK.text(record).encode("ascii")


def tar_header(name: str, size: int) -> bytes:
    """Return the 512 bytes before a file of an archive: a plain file of user 0 and of 1970 that all may read.

    They are made here and not by `tarfile`, whose headers differ between versions of Python.
    """
    octal = f"{size:011o}\0".encode() if size < _LARGEST_OCTAL else b"\x80" + size.to_bytes(11, "big")
    before = name.encode("ascii").ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + octal + b"0" * 11 + b"\0"
    after = b"0" + bytes(100) + b"ustar\x0000" + bytes(64) + b"0000000\0" * 2 + bytes(167)
    total = sum(before) + 8 * ord(" ") + sum(after)
    return before + f"{total:06o}\0 ".encode() + after


def padding(size: int) -> bytes:
    """Return the zero bytes after a file of `size` bytes."""
    return bytes(-size % BLOCK)


def fault_of_header(found: bytes, name: str, size: int) -> str | None:
    """Return what is wrong with the 512 bytes in the place of the header of a file, or None if they are that header."""
    if found == tar_header(name, size):
        return None
    if len(found) < BLOCK or not found.strip(b"\0"):
        return f"it ends before {name}"
    other = found[:100].rstrip(b"\0").decode("utf-8", "replace")
    if found[156:157] in _KINDS:
        return f"{other} is {_KINDS[found[156:157]]}, and not a plain file"
    if other != name:
        return f"it has {other} in the place of {name}"
    return f"the size, or another field, of {name} differs from the list"


def size_of_list(found: bytes) -> int | None:
    """Return the size of the list from the first 512 bytes of a file; None if no packed file begins with them."""
    digits = found[124:135]
    if len(found) < BLOCK or not found.startswith(LIST.encode() + b"\0") or not digits.isdigit():
        return None
    try:
        size = int(digits, 8)
    except ValueError:
        return None
    return size if found == tar_header(LIST, size) else None


def require_order(files: Sequence[SharedFile], header: str) -> str | None:
    """Return what is wrong with the files of a list: the header is first, then the others by name, each once."""
    names = [file.name for file in files]
    if names[:1] != [header]:
        return f"its list does not begin with {header}"
    twice = next((name for name in names if names.count(name) > 1), None) if len(set(names)) < len(names) else None
    if twice is not None:
        return f"its list has {twice} twice"
    return None if names[1:] == sorted(names[1:]) else "its list is not in order"

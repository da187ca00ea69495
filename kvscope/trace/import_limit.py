"""How large the arrays of a captured file may be: known from their headers, before memory is taken for them."""

from __future__ import annotations

import re
import zipfile
from math import prod
from pathlib import Path
from typing import IO

import numpy as np

from kvscope.core.errors import UsageError
from kvscope.core.output import size

# Every array that an import reads; others are neither read nor counted. numpy.savez calls what has no name `arr_0`.
KNOWN = re.compile(
    r"attentions?|value_l1|value_l2|key_l2|queries|keys|values|tokens|input_ids|sequences|prompt_length|attention_mask"
    r"|sink_mass|arr_\d+"
)
# Compressed attention of a sliding window of 16 of 1,024 tokens takes a sixtieth of its size (measured), of all tokens
# about a third. Deflate expands a file of zeros a thousand times, and a view of one number expands without limit.
MOST = 100
ALWAYS = 2**26  # bytes that arrays may have whatever the size of their file


class ArraySizes:
    """Adds up the bytes of the arrays of one file.

    Parameters
    ----------
    source : Path
        The file.
    """

    def __init__(self, source: Path) -> None:
        self._source, self._total = source, 0
        self._limit = max(ALWAYS, MOST * source.stat().st_size)

    def add(self, count: int) -> None:
        """Add the bytes of an array.

        Raises
        ------
        UsageError
            If all together are more than 64 MB and 100 times the size of the file.
        """
        self._total += count
        if self._total > self._limit:
            raise UsageError(
                f"{self._source} has {size(self._source.stat().st_size)}, and its arrays {size(self._total)} or more: "
                f"more than {MOST} times as much",
                "Save them without compression, with numpy.savez.",
            )

    def add_npy(self, stream: IO[bytes]) -> None:
        """Add the array whose ``.npy`` header a stream begins with; raises ValueError if it has none."""
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"an array has the npy format {version[0]}.{version[1]}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
        self.add(prod(shape) * dtype.itemsize)


def require_npz(source: Path) -> None:
    """Raise UsageError if the known arrays of an ``.npz`` file are too large for it."""
    sizes = ArraySizes(source)
    with zipfile.ZipFile(source) as archive:
        for member in archive.infolist():
            if KNOWN.fullmatch(member.filename.removesuffix(".npy")):
                with archive.open(member) as stream:
                    sizes.add_npy(stream)


def require_npy(source: Path) -> None:
    """Raise UsageError if the array of an ``.npy`` file is too large for it."""
    with source.open("rb") as stream:
        ArraySizes(source).add_npy(stream)


def require_torch(source: Path) -> None:
    """Raise UsageError if what `torch.load` would take into memory is too large for the file."""
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            ArraySizes(source).add(sum(member.file_size for member in archive.infolist()))

"""The files of a trace or a replay, each compared with what was recorded of it before it is used."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Lock

from kvscope.core.errors import KvscopeError
from kvscope.core.output import checksum


class CheckedFiles:
    """Files of one folder; a checksum is compared the first time that a file is asked for.

    Threads may share it: other files can be read while one is compared.

    Parameters
    ----------
    folder : Path
        Folder of the files.
    sizes, checksums : mapping
        Bytes and SHA-256 of each file, by its relative path.
    damaged : callable
        Makes the error from the name of a file and what is wrong with it.
    compare : bool
        Whether checksums are compared; sizes always are.
    """

    def __init__(
        self,
        folder: Path,
        sizes: Mapping[str, int],
        checksums: Mapping[str, str],
        damaged: Callable[[str, str], KvscopeError],
        *,
        compare: bool = True,
    ) -> None:
        self._folder, self._sizes, self._checksums = folder, sizes, checksums
        self._damaged, self._compare = damaged, compare
        self._same: set[str] = set()
        self._locks: dict[str, Lock] = defaultdict(Lock)

    def path(self, name: str) -> Path:
        """Return the path of a file whose checksum is the recorded one.

        Raises
        ------
        KvscopeError
            If the file is not recorded, missing, of another size, a link out of the folder, or has another checksum.
        """
        if name not in self._sizes:
            raise self._damaged(name, "it is not among the recorded files")
        with self._locks[name]:
            if name not in self._same:
                self._require_there(name)
                if self._compare and checksum(self._folder / name) != self._checksums[name]:
                    raise self._damaged(name, "its checksum differs from the recorded one")
                self._same.add(name)
        return self._folder / name

    def require_there(self) -> None:
        """Raise KvscopeError unless every file is in the folder and has its recorded size."""
        for name in self._sizes:
            self._require_there(name)

    def require_same(self) -> None:
        """Raise KvscopeError unless every file has its recorded checksum."""
        for name in self._sizes:
            self.path(name)

    def _require_there(self, name: str) -> None:
        file = self._folder / name
        try:
            if not file.is_file():
                raise self._damaged(name, "it is missing")
            if not file.resolve().is_relative_to(self._folder.resolve()):
                raise self._damaged(name, "it is a link to a file outside")
            size = file.stat().st_size
        except (OSError, RuntimeError) as error:  # a link to itself, a folder without permission
            raise self._damaged(name, f"it cannot be read ({error})") from error
        if size != self._sizes[name]:
            raise self._damaged(name, f"it has {size} bytes instead of {self._sizes[name]}")

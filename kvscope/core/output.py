"""Writing the folder of a trace or a replay: what may be replaced, and when the folder gets its name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path

from kvscope.core.errors import KvscopeError, OutputExists


@dataclass(frozen=True)
class OutputFolder:
    """A folder that is written as ``PATH.incomplete`` and renamed when it is complete.

    Attributes
    ----------
    path : Path
        Final path of the folder.
    kind : str
        Kind of the folder, for messages: ``trace``, ``replay``.
    header : str
        Its JSON file that says what it is, and while it is written, which process writes it.
    members : str
        Regular expression of the relative paths that such a folder may hold; a folder with anything else is never
        removed.
    error : type
        What to raise.
    force : bool
        Whether an existing one may be replaced.
    """

    path: Path
    kind: str
    header: str
    members: str
    error: type[KvscopeError]
    force: bool = False

    @property
    def work(self) -> Path:
        """Path of the folder while it is written."""
        return self.path.with_name(self.path.name + ".incomplete")

    def begin(self) -> dict[str, object]:
        """Make the folder to write into; returns the record of the writing process for the header.

        Output of a killed run is removed. Raises `OutputExists` if the path is taken, and `error` if another
        process writes it or what would be removed is something else.
        """
        if _there(self.path):
            require_free(self.path, force=self.force)
            self.require_own(self.path)
        if _there(self.work):
            self.require_own(self.work)
            writer = self._writer()
            if writer is not None:
                raise self.error(
                    f"process {writer} is writing {self.work}", "Wait for it, or name another folder with --output."
                )
            shutil.rmtree(self.work)
        self.work.mkdir(parents=True)
        return {"pid": os.getpid(), "host": socket.gethostname()}

    def finish(self) -> None:
        """Give the folder its name, in place of an older one with `force`."""
        if self.force and _there(self.path):
            self.require_own(self.path)
            shutil.rmtree(self.path)
        self.work.rename(self.path)

    def require_own(self, path: Path) -> None:
        """Raise `error` if a folder holds files that no folder of its kind has: it must not be removed."""
        if path.is_symlink() or not path.is_dir():
            raise self.error(f"{path} is not a folder of a {self.kind}", "Name another with --output.")
        inside = sorted(str(item.relative_to(path)) for item in path.rglob("*") if not item.is_dir())
        foreign = [name for name in inside if not re.fullmatch(self.members, name)]
        if foreign:
            raise self.error(
                f"{path} holds {foreign[0]}, which no {self.kind} has: it is not replaced",
                f"Move {foreign[0]} elsewhere, or name another with --output.",
            )

    def unwritable(self, error: OSError) -> KvscopeError:
        """Return the error for a folder that cannot be written."""
        if error.errno == errno.ENOSPC:
            return self.error(
                f"the disk of {self.path} is full", "Free some space, or write to another disk with --output."
            )
        return self.error(
            f"cannot write {self.path}: {error.strerror or error}",
            "Name a folder that can be written, with --output.",
        )

    def _writer(self) -> int | None:
        """Return the process on this machine that is writing the folder, or None."""
        try:
            writer = json.loads((self.work / self.header).read_text(encoding="utf-8"))["writer"]
            host, pid = writer["host"], int(writer["pid"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return pid if host == socket.gethostname() and pid != os.getpid() and _runs(pid) else None


def require_free(path: Path, *, force: bool) -> None:
    """Raise OutputExists if something is at `path` and may not be replaced."""
    if _there(path) and not force:
        raise OutputExists(str(path))


def checksum(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def size(count: float) -> str:
    """Return a number of bytes for people: ``4.2 MB``."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("the last unit returns")


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""Writing output: a file or folder gets its name when it is complete, and what it replaces is removed after that."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvscope.core.errors import KvscopeError, OutputExists

INCOMPLETE = ".incomplete"  # suffix of output while it is written
REPLACED = ".replaced"  # suffix of an older folder from the moment a new one takes its name until it is removed


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
        return incomplete(self.path)

    def begin(self) -> dict[str, object]:
        """Make the folder to write into; returns the record of the writing process for the header.

        Output of a killed run is removed, and an older folder that such a run had set aside gets its name back. Raises
        `OutputExists` if the path is taken, and `error` if another process writes it or what would be removed is
        something else.
        """
        writer: dict[str, object] = {"pid": os.getpid(), "host": socket.gethostname()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.locked():
            self._make_room()
            self.work.mkdir()
            with self.abandoned_on_error():  # a disk that is full leaves an empty folder
                (self.work / self.header).write_text(json.dumps({"writer": writer}))
        return writer

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which no other process begins or finishes output in the same parent folder.

        Write the header inside it: another process that reads half of it would take the folder for an abandoned one,
        and remove it.
        """
        return _locked(self.path.parent)

    def finish(self) -> None:
        """Give the folder its name, in place of an older one with `force`, which is removed only after that."""
        with self.locked():
            old = self.force and _there(self.path)
            if old:
                self.require_own(self.path)
                self.path.rename(replaced(self.path))
            try:
                self.work.rename(self.path)
            except OSError:
                if old:
                    replaced(self.path).rename(self.path)
                raise
            if old:
                shutil.rmtree(replaced(self.path))

    def abandon(self) -> None:
        """Remove what was written, after an error or an interruption; a folder that is finished is left as it is."""
        shutil.rmtree(self.work, ignore_errors=True)

    @contextlib.contextmanager
    def abandoned_on_error(self) -> Iterator[None]:
        """Call `abandon` if an error or an interruption ends the block."""
        try:
            yield
        except BaseException:
            self.abandon()
            raise

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
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return self.error(
                f"the disk of {self.path} is full", "Free some space, or write to another disk with --output."
            )
        return self.error(
            f"cannot write {self.path}: {error.strerror or error}",
            "Name a folder that can be written, with --output.",
        )

    def _make_room(self) -> None:
        """Remove what a killed run left; raises if the path is taken, or another process writes the folder."""
        self._recover()
        if _there(self.path):
            require_free(self.path, force=self.force)
            self.require_own(self.path)
        if not _there(self.work):
            return
        writer = writer_of(self.path)
        if writer is not None:
            raise self.error(
                f"process {writer} is writing {self.work}", "Wait for it, or name another folder with --output."
            )
        self.require_own(self.work)
        shutil.rmtree(self.work)

    def _recover(self) -> None:
        """Complete the replacement of a folder by a run that was killed between its steps."""
        if not _there(replaced(self.path)):
            return
        self.require_own(replaced(self.path))
        if _there(self.path):
            shutil.rmtree(replaced(self.path))
        else:
            replaced(self.path).rename(self.path)


def incomplete(path: Path) -> Path:
    """Return the path of an output while it is written."""
    return path.with_name(path.name + INCOMPLETE)


def replaced(path: Path) -> Path:
    """Return the path of an older folder while a new one takes its name."""
    return path.with_name(path.name + REPLACED)


def require_not_set_aside(path: Path, kind: str, error: type[KvscopeError]) -> None:
    """Raise `error` if a run was killed after it set a folder aside, before the new one had its name."""
    if replaced(path).exists():
        raise error(
            f"{kind} {path} was being replaced when kvscope was stopped",
            f"The older one is whole: rename {replaced(path)} to {path.name}.",
        )


def writer_of(path: Path) -> int | None:
    """Return the other process on this machine that is writing the folder `path`, or None."""
    for file in incomplete(path).glob("*.json"):
        try:
            writer = json.loads(file.read_text(encoding="utf-8"))["writer"]
            host, pid = writer["host"], int(writer["pid"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if host == socket.gethostname() and pid != os.getpid() and is_running(pid):
            return pid
    return None


def replace_file(path: Path, content: bytes, *, force: bool = True) -> None:
    """Write a file, in place of an existing one, which is whole until then.

    Two processes may write the same file: one waits for the other, and the file is whole at any time.

    Raises
    ------
    OSError
        If it cannot be written; nothing is left of it then.
    OutputExists
        If there is a file and `force` is off: another process may have written it since this one began.
    """
    work = incomplete(path)
    with _locked(path.parent):
        require_free(path, force=force)
        try:
            work.write_bytes(content)
            work.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                work.unlink(missing_ok=True)
            raise


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


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process of this machine is in this context for the same folder; Windows has no such lock."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written but not listed has no lock
        yield
        return
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot lock a folder
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def is_running(pid: int) -> bool:
    """Return whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""The folder of a replay while it is written: what may be replaced, and what may never be."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
from pathlib import Path

from kvscope.errors import ResultError
from kvscope.results.schema import FILES, RUN


def require_free(path: Path, *, force: bool) -> None:
    """Raise ResultError if `path` is taken; with `force`, only if it is something else than a replay."""
    if not (path.exists() or path.is_symlink()):
        return
    if not force:
        raise ResultError(f"{path} exists", "Name another with --output, or replace it with --force.")
    require_own(path)


def require_own(path: Path) -> None:
    """Raise ResultError if a folder holds anything that no replay has: then it is not ours to remove."""
    if path.is_symlink() or not path.is_dir():
        raise ResultError(f"{path} is not a folder of a replay", "Name another with --output.")
    foreign = sorted(item.name for item in path.iterdir() if item.name not in FILES or item.is_dir())
    if foreign:
        raise ResultError(
            f"{path} holds {foreign[0]}, which no replay has: it is not replaced",
            f"Move {foreign[0]} elsewhere, or name another with --output.",
        )


def clear_unfinished(work: Path) -> None:
    """Remove what a killed run left; ResultError while its process still writes, or if it is something else."""
    if not (work.exists() or work.is_symlink()):
        return
    require_own(work)
    try:
        writer = json.loads((work / RUN).read_text(encoding="utf-8"))["writer"]
        alive = writer["host"] == socket.gethostname() and writer["pid"] != os.getpid() and _runs(writer["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        alive = False
    if alive:
        raise ResultError(f"process {writer['pid']} is writing {work}", "Wait for it, or name another with --output.")
    shutil.rmtree(work)


def unwritable(path: Path, error: OSError) -> ResultError:
    """Return the error for a folder that cannot be written."""
    if error.errno == errno.ENOSPC:
        return ResultError(f"the disk of {path} is full", "Free some space, or write to another disk with --output.")
    return ResultError(
        f"cannot write {path}: {error.strerror or error}", "Name a folder that can be written, with --output."
    )


def checksum(file: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

"""The folder that keeps what was fetched from other machines."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvscope.core.errors import ShareError

VARIABLE = "KVSCOPE_CACHE"


def cache_folder() -> Path:
    """Return the folder: ``$KVSCOPE_CACHE``, otherwise ``kvscope`` in ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Raises
    ------
    ShareError
        If neither is set and the home folder of the user is not known.
    """
    own = os.environ.get(VARIABLE)
    if own:
        return Path(own).absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "kvscope"
    except RuntimeError as error:
        raise ShareError("there is no home folder to keep fetched files in", f"Set {VARIABLE} to a folder.") from error


def place_of(url: str) -> Path:
    """Return the folder that keeps every version of what is at an address."""
    return cache_folder() / _short(url.encode("utf-8", "surrogatepass"))


def version_of(content: bytes) -> str:
    """Return the name under which a version is kept: it follows from the content that lists all checksums."""
    return _short(content)


@contextmanager
def cache_explained() -> Iterator[None]:
    """Turn an error of the file system into a ShareError that names the folder and its variable."""
    try:
        yield
    except OSError as error:
        raise ShareError(
            f"cannot write into the cache {cache_folder()}: {error.strerror or error}",
            f"Free some space or correct the permissions, or name another folder: {VARIABLE}=FOLDER",
        ) from error


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]

"""Files and folders that get their name when all of them is written; processes may write the same one at once."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kvscope.core.output import INCOMPLETE, is_running


@contextlib.contextmanager
def written_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream; what is written to it becomes the file `path` when the block ends, and nothing is left otherwise.

    Every process writes into a file of its own, and the last one that finishes gives the name. What killed processes of
    this machine have left is removed.
    """
    _remove_leftovers(path)
    work = path.with_name(f"{path.name}.{_this_process()}{INCOMPLETE}")
    try:
        with work.open("xb") as stream:
            yield stream
        work.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            work.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say of what
        raise


@contextlib.contextmanager
def first_complete(path: Path) -> Iterator[Path]:
    """Yield an empty folder that gets the name `path` when the block ends, unless a folder has it by then.

    For content that is the same whoever writes it: several processes may write it at once, each into a folder of its
    own. What killed processes of this machine have left is removed, and nothing is left after an error.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    work = Path(tempfile.mkdtemp(f"{INCOMPLETE}", f"{path.name}.{_this_process()}.", path.parent))
    try:
        yield work
        try:
            work.rename(path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _this_process() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _remove_leftovers(path: Path) -> None:
    """Remove what processes of this machine that no longer run have left of `written_file` or `first_complete`."""
    own = rf"{re.escape(path.name)}\.{re.escape(socket.gethostname())}-(\d+)(\.\w+)?{re.escape(INCOMPLETE)}"
    for item in path.parent.iterdir():
        found = re.fullmatch(own, item.name)
        if found is None or is_running(int(found[1])):
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink(missing_ok=True)

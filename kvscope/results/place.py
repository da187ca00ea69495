"""Where a replay made in Python is written: the named folder, or a temporary one that is removed with its object."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from weakref import finalize

from kvscope.results.store import Replay


def written(write: Callable[[Path], Replay], output: Path | str | None) -> Replay:
    """Return what `write` makes in the folder `output`, or in a temporary folder that lives as long as the object."""
    if output is not None:
        return write(Path(output))
    folder = Path(mkdtemp(prefix="kvscope-"))
    try:
        made = write(folder / "replay")
    except BaseException:
        rmtree(folder)
        raise
    finalize(made, rmtree, folder, ignore_errors=True)
    return made

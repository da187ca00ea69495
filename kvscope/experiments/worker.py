"""A worker of a cluster: it makes one unit at a time, and keeps the model of the last one loaded."""

from __future__ import annotations

import ctypes
import os
import socket
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from kvscope.core.errors import KvscopeError
from kvscope.core.version import __version__
from kvscope.experiments.execute import UnitResult, run_unit
from kvscope.experiments.plan import ReplayUnit, Unit
from kvscope.model.kept import keep_loaded
from kvscope.trace.schema import HEADER

VISIBLE = 60.0  # seconds: network file systems may show a new file to other machines as late as that


@dataclass(frozen=True)
class Surroundings:
    """What a worker needs to find where it runs.

    Attributes
    ----------
    folder : str
        The current folder of the command, to which paths are relative.
    markers : dict of str to str
        Path and content of a file in each folder that the worker is to read and write.
    version : str
        Version of kvscope.
    """

    folder: str
    markers: dict[str, str]
    version: str = __version__


class Worker:
    """Makes units in a process of its own; `share` and `stop` are called while `make` runs in another thread."""

    def __init__(self) -> None:
        self._kept = ExitStack()
        self._kept.enter_context(keep_loaded())  # as long as the process lives
        self._share = 0.0
        self._thread: int | None = None  # that makes a unit

    def start(self, needed: Surroundings) -> KvscopeError | None:
        """Enter the current folder of the command; return what is missing here for its results to be the same."""
        host = socket.gethostname()
        if needed.version != __version__:
            return KvscopeError(
                f"a worker on {host} has kvscope {__version__}, and this is {needed.version}",
                "Install the same version on every machine.",
            )
        for marker, content in needed.markers.items():
            if not _shares(Path(needed.folder) / marker, content):
                return KvscopeError(
                    f"a worker on {host} cannot read and write {(Path(needed.folder) / marker).parent}",
                    "Run the experiment in a folder that all machines share, at the same path on each.",
                )
        os.chdir(needed.folder)
        return None

    def make(self, unit: Unit) -> UnitResult | None:
        """Make a unit and return what failed; None if it was stopped. Errors as `run_unit`."""
        self._share, self._thread = 0.0, threading.get_ident()
        try:
            if isinstance(unit, ReplayUnit):
                await_file(unit.cell.path / HEADER)
            return run_unit(unit, self._progress)
        except KeyboardInterrupt:
            return None
        finally:
            self._thread = None

    def share(self) -> float:
        """Return how much of its unit is done, from 0 to 1."""
        return self._share

    def stop(self) -> None:
        """Interrupt the unit that is being made, as Ctrl-C does: what is unfinished is removed."""
        if self._thread is not None:
            interruption = ctypes.py_object(KeyboardInterrupt)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread), interruption)

    def _progress(self, share: float) -> None:
        self._share = share


def await_file(file: Path, seconds: float = VISIBLE) -> bool:
    """Return whether a file that another machine wrote can be seen, now or within so many seconds."""
    end = time.monotonic() + seconds
    while not file.is_file():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _shares(file: Path, content: str) -> bool:
    """Return whether a file has the content that another machine gave it, and its folder can be written."""
    try:
        return file.read_text(encoding="utf-8") == content and os.access(file.parent, os.W_OK)
    except OSError:
        return False

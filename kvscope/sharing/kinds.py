"""What can be shared: a trace or a replay, each a folder whose header lists its other files with size and SHA-256."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from kvscope.core.errors import KvscopeError, ResultError, ShareError, TraceError
from kvscope.core.json_records import Checksum, Number, about
from kvscope.core.records import RUN_FILE, ReplayRecord, replay_of
from kvscope.results import schema as results
from kvscope.results.store import open_replay
from kvscope.trace import schema as traces
from kvscope.trace.reader import open_trace
from kvscope.trace.record import TraceRecord
from kvscope.trace.record_file import record_of

HEADER_BYTES = 2**26  # largest header that is read from a packed file or from another machine
Noun = Literal["trace", "replay"]


@dataclass(frozen=True)
class SharedFile:
    """One file of a trace or a replay."""

    name: Annotated[str, about("path in the folder")]
    bytes: Annotated[Number, about("its size")]
    sha256: Annotated[Checksum, about("SHA-256 of its content")]


@dataclass(frozen=True)
class Kind:
    """A kind of folder that can be shared.

    Attributes
    ----------
    noun : str
        ``trace`` or ``replay``.
    header : str
        Its JSON file that lists the others.
    members : str
        Regular expression of the paths that it may hold.
    place : str
        Folder in which such folders are kept.
    error : type
        What its damage raises.
    parse : callable
        Returns the record in the bytes of a header; the second argument is the name of the folder for messages.
    open : callable
        Checks a whole folder; raises `error` if it is damaged. Its argument is the folder.
    """

    noun: Noun
    header: str
    members: str
    place: Path
    error: type[KvscopeError]
    parse: Callable[[bytes, str], TraceRecord | ReplayRecord]
    open: Callable[[Path], object]

    def files(self, header: bytes, source: str) -> list[SharedFile]:
        """Return the other files of a folder, in order, as its header lists them.

        Raises
        ------
        KvscopeError
            `error` if the header is damaged or of another version, ShareError for a path that no such folder has.
        """
        record = self.parse(header, source)
        return [
            SharedFile(self.require_member(name, source), record.sizes[name], record.checksums[name])
            for name in sorted(record.sizes)
        ]

    def require_member(self, name: str, source: str) -> str:
        """Return a path if a folder of this kind may hold it; raise ShareError for any other, as one that leaves it."""
        if re.fullmatch(self.members, name) is None:
            raise ShareError(f"{source} lists {name!r}, which no {self.noun} has", "Ask for it again.")
        return name


TRACE = Kind(
    "trace", traces.HEADER, traces.MEMBERS, Path("traces"), TraceError, lambda text, at: record_of(text, at), open_trace
)
REPLAY = Kind(
    "replay", RUN_FILE, results.MEMBERS, Path("reports"), ResultError, lambda text, at: replay_of(text, at), open_replay
)
KINDS: Mapping[str, Kind] = {kind.noun: kind for kind in (TRACE, REPLAY)}

"""Find the trace that was recorded last."""

from __future__ import annotations

from pathlib import Path

from kvscope.core.errors import RECORD_ONE, TraceError
from kvscope.core.newest import newest_first
from kvscope.trace.record_file import read_record
from kvscope.trace.schema import HEADER


def newest_trace(folder: Path = Path("traces")) -> Path:
    """Return the folder of the newest complete trace in `folder`.

    Raises
    ------
    TraceError
        If there is no complete trace.
    """
    for candidate in newest_first(folder, HEADER):
        try:
            read_record(candidate)
        except TraceError:
            continue  # incomplete, not a trace, or of a version that cannot be read
        return candidate
    raise TraceError(f"no complete trace in {folder}/", RECORD_ONE)

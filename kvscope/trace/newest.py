"""Find the trace that was recorded last."""

from __future__ import annotations

from pathlib import Path

from kvscope.core.errors import RECORD_ONE, TraceError
from kvscope.trace.record_file import read_record


def newest_trace(folder: Path = Path("traces")) -> Path:
    """Return the folder of the newest complete trace in `folder`.

    Raises
    ------
    TraceError
        If there is no complete trace.
    """
    found: list[tuple[str, float, Path]] = []
    for candidate in folder.iterdir() if folder.is_dir() else []:
        try:
            record = read_record(candidate)
        except TraceError:
            continue  # incomplete, not a trace, or of a version that cannot be read
        found.append((record.created, candidate.stat().st_mtime, candidate))
    if not found:
        raise TraceError(f"no complete trace in {folder}/", RECORD_ONE)
    return max(found)[2]

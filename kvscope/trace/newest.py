"""Finding the trace that was recorded last."""

from __future__ import annotations

from pathlib import Path

from kvscope.core.errors import RECORD_ONE, TraceError
from kvscope.trace.record import read_record


def newest_trace(folder: Path = Path("traces")) -> Path:
    """Return the newest whole trace under `folder`.

    Raises
    ------
    TraceError
        If there is none.
    """
    found: list[tuple[str, float, Path]] = []
    for candidate in folder.iterdir() if folder.is_dir() else []:
        try:
            record = read_record(candidate)
        except TraceError:
            continue  # unfinished, foreign or of another version: not what "newest whole trace" means
        found.append((record.created, candidate.stat().st_mtime, candidate))
    if not found:
        raise TraceError(f"no whole trace under {folder}/", RECORD_ONE)
    return max(found)[2]

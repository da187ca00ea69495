"""The baseline of a CI regression check: reading a summary, and replacing it by a newer one."""

from __future__ import annotations

from pathlib import Path

from kvscope.core.errors import ResultError, UsageError
from kvscope.core.output import replace_file
from kvscope.core.records import RUN_FILE
from kvscope.core.summary_records import SUMMARY_FILE, SummaryRecord, read_summary
from kvscope.results.store import open_replay


def load_summary(path: Path | str) -> SummaryRecord:
    """Return the summary of a replay folder, or of a committed ``summary.json``.

    Raises
    ------
    ResultError
        If it is neither, incomplete, damaged, or of another version.
    """
    path = Path(path)
    return read_summary(path) if path.is_file() else open_replay(path).summary


def accept(new: Path, baseline: Path) -> None:
    """Make the summary of `new`, byte by byte, the baseline; a reader sees the old one or the new one, never a part.

    Parameters
    ----------
    new : Path
        Replay folder or ``summary.json``.
    baseline : Path
        File to write; need not exist.

    Raises
    ------
    UsageError
        If `baseline` is not a ``.json`` file, or is in the folder of a replay: replays are never modified.
    ResultError
        If `new` is not a complete summary, or the file cannot be written.
    """
    if baseline.is_dir() or baseline.suffix != ".json":
        raise UsageError(
            f"{baseline} is not a .json file, and replays are never modified", "Name a file: baseline.json"
        )
    if (baseline.parent / RUN_FILE).exists():
        raise UsageError(
            f"{baseline} belongs to a replay, and replays are never modified", "Name a file elsewhere: baseline.json"
        )
    load_summary(new)
    content = (new if new.is_file() else new / SUMMARY_FILE).read_bytes()
    try:
        baseline.parent.mkdir(parents=True, exist_ok=True)
        replace_file(baseline, content)
    except OSError as error:
        raise ResultError(f"cannot write {baseline}: {error.strerror}", "Name a writable file.") from error

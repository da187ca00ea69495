"""The order in which folders of traces or replays were finished."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec


class _Finished(msgspec.Struct):
    """The date in a header. Nothing else of it is decoded, because that takes longer than everything else here."""

    created: str = ""


def newest_first(folder: Path, header: str) -> Iterator[Path]:
    """Yield the subfolders with a file `header`, the last finished one first; none of them is validated.

    A folder that cannot be read, or whose header is not JSON, is omitted. An invalid date sorts last; of equal dates
    the folder that was modified last comes first.
    """
    decoder = msgspec.json.Decoder(_Finished)
    found: list[tuple[datetime, float, Path]] = []
    try:
        candidates = list(folder.iterdir())
    except OSError:
        return
    for candidate in candidates:
        try:
            created = decoder.decode((candidate / header).read_bytes()).created
            found.append((_date(created), candidate.stat().st_mtime, candidate))
        except (OSError, msgspec.MsgspecError, RecursionError):
            continue
    for _, _, path in sorted(found, reverse=True):
        yield path


def _date(text: str) -> datetime:
    try:
        date = datetime.fromisoformat(text)
        return (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return datetime.min.replace(tzinfo=UTC)

"""The newest folder is found by its date, whatever else lies beside it, without reading all of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

from kvscope.core.newest import newest_first


def make(folder: Path, name: str, text: str, *, changed: int = 0) -> None:
    (folder / name).mkdir()
    (folder / name / "run.json").write_text(text)
    os.utime(folder / name, (changed, changed))


def names(folder: Path) -> list[str]:
    return [path.name for path in newest_first(folder, "run.json")]


def test_dates_are_compared_as_dates(tmp_path: Path) -> None:
    make(tmp_path, "east", json.dumps({"created": "2026-01-02T01:00:00+09:00"}))  # 16:00 the day before in UTC
    make(tmp_path, "utc", json.dumps({"created": "2026-01-01T20:00:00+00:00"}))
    make(tmp_path, "naive", json.dumps({"created": "2026-01-01T19:00:00"}))
    assert names(tmp_path) == ["utc", "naive", "east"]


def test_an_invalid_date_is_the_oldest(tmp_path: Path) -> None:
    make(tmp_path, "bad", json.dumps({"created": "zzz"}), changed=9)
    make(tmp_path, "none", "{}", changed=10)
    make(tmp_path, "far", json.dumps({"created": "9999-12-31T23:59:59-12:00"}), changed=8)
    make(tmp_path, "good", json.dumps({"created": "1999-01-01T00:00:00+00:00"}))
    assert names(tmp_path) == ["good", "none", "bad", "far"]


def test_what_cannot_be_read_stops_nothing(tmp_path: Path) -> None:
    make(tmp_path, "good", json.dumps({"created": "2026-01-01T00:00:00+00:00"}))
    for name, text in (("empty", ""), ("nested", "[" * 100_000), ("number", json.dumps({"created": 3}))):
        make(tmp_path, name, text)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("{}")
    (tmp_path / "folder" / "run.json").mkdir(parents=True)
    assert names(tmp_path) == ["good"]
    assert list(newest_first(tmp_path / "absent", "run.json")) == []

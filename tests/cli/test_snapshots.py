"""What commands print on terminals of three widths is what was last read and committed."""

from __future__ import annotations

import pytest

from tools import snapshots


@pytest.mark.parametrize("width", snapshots.WIDTHS)
@pytest.mark.parametrize("name", snapshots.COMMANDS)
def test_an_output_is_that_of_its_snapshot(name: str, width: int) -> None:
    kept = (snapshots.FOLDER / f"{name}-{width}.txt").read_text("utf-8")
    now = snapshots.printed(name, width)
    assert now == kept, "after an intended change: python tools/snapshots.py"
    assert max(len(line) for line in now.splitlines()) <= width


def test_every_snapshot_has_a_command() -> None:
    expected = {f"{name}-{width}.txt" for name in snapshots.COMMANDS for width in snapshots.WIDTHS}
    assert {file.name for file in snapshots.FOLDER.glob("*.txt")} == expected

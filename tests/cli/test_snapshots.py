"""What commands print on terminals of three widths is what was last read and committed."""

from __future__ import annotations

import pytest

from kvscope.cli.console import Column
from tools import snapshots

AGAIN = "after an intended change: python tools/snapshots.py"


@pytest.mark.parametrize("name", snapshots.HELP)
def test_help_is_that_of_its_snapshot(name: str) -> None:
    for width in snapshots.WIDTHS:
        now = snapshots.printed(name, width)
        assert now == kept(name, width), AGAIN
        assert longest(now) <= width


def test_outputs_of_runs_are_those_of_their_snapshots() -> None:
    """One test, so that one process runs the session."""
    names = [step.name for step in snapshots.SESSION if step.name]
    printed = {(name, width): snapshots.printed(name, width) for name in names for width in snapshots.WIDTHS}
    for (name, width), now in printed.items():
        before = kept(name, width)
        assert snapshots.same(now, before) or now == before, AGAIN  # where they differ, `==` shows how
        assert longest(now) <= width, f"{name} at {width}"


def test_every_snapshot_has_a_command() -> None:
    expected = {f"{name}-{width}.txt" for name in snapshots.COMMANDS for width in snapshots.WIDTHS}
    assert {file.name for file in snapshots.FOLDER.glob("*.txt")} == expected


def test_only_the_last_digit_of_a_fraction_may_differ() -> None:
    line = "h2o  20%  -0.574  16.0  0.049 tova  12"
    assert snapshots.same(line, "h2o 20%  -0.575  16.1  0.048 tova  12")
    for other in ("0.576", "0.5740", "-0.57"):
        assert not snapshots.same(line, line.replace("-0.574", other))
    for part in ("20%", "12", "tova"):
        assert not snapshots.same(line, line.replace(part, "13"))
    assert not snapshots.same(line, f"{line} 0.1")


def test_masks_hide_sizes_times_identities_and_rounding_alone() -> None:
    made = snapshots.masked(("made", "2026-11-28T19:52:40+00:00 by kvscope 0.1.0 on cpu"))
    assert made == ("made", "####-##-##T##:##:##+00:00 by kvscope #.#.# on cpu")
    assert snapshots.masked(["1.7 MB, 312 B", "identity d5fb491d7ed4b994"]) == [
        "#.# MB, #.# MB",
        f"identity {'#' * 16}",
    ]
    (cell,) = snapshots.masked(Column("logits", ["3.6e-15"])).cells
    assert cell == "#.#e-1#"
    for shown in ("0.574", "1.2e-05", "16 Bits", "keys 18", "deadbeef"):
        assert snapshots.masked(shown) == shown


def kept(name: str, width: int) -> str:
    return (snapshots.FOLDER / f"{name}-{width}.txt").read_text("utf-8")


def longest(text: str) -> int:
    """Return the length of the longest line that was printed, which are all but the command."""
    return max(len(line) for line in text.splitlines()[1:])

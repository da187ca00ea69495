"""What is skipped is one line, which ends with what to do; lines on a terminal are broken between words."""

from __future__ import annotations

import io

import pytest

from kvscope.cli import console
from kvscope.cli.skipped import not_computed, skipped_line

VECTORS = "Record it again with --store maps+vectors or qkv, or import it with keys."
WHY = {
    "keydiff": "keydiff needs keys, which traces/a b does not hold",
    "quest(page=4)": "quest(page=4) needs keys, which traces/a b does not hold",
    "kvzip": "kvzip needs reconstruction, which traces/a b does not hold",
    "snapkv": "snapkv is not defined for stream prefill",
}
REMEDIES = {
    "keydiff": VECTORS,
    "quest(page=4)": VECTORS,
    "kvzip": "Record it again with --reread.",
    "snapkv": "Use full.",
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_names_are_grouped_and_flags_named_once() -> None:
    assert skipped_line(WHY, REMEDIES) == (
        "skipped: keydiff, quest (needs keys); kvzip (needs reconstruction); snapkv (is not defined for stream "
        "prefill). Record the trace again with --store maps+vectors --reread to include more of them."
    )


def test_without_flags_the_line_ends_with_the_only_remedy_or_how_to_see_it() -> None:
    assert skipped_line({"snapkv": WHY["snapkv"]}, REMEDIES).endswith(" Use full.")
    two = {"snapkv": WHY["snapkv"], "mine": "mine is too large"}
    assert skipped_line(two, REMEDIES | {"mine": "Make it smaller."}).endswith("needs: --policy snapkv")
    assert skipped_line(two, {}, "Name one.").endswith(" Name one.")


def test_metrics_with_one_reason_are_one_line() -> None:
    why = "it needs values, which the trace does not hold. Do this."
    lines = not_computed({"output_error": why, "other": why, "last": "it is new."})
    assert lines == [
        "Not computed: output_error, other. It needs values, which the trace does not hold. Do this.",
        "Not computed: last. It is new.",
    ]


def test_a_warning_is_broken_between_words_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    text = skipped_line(WHY, REMEDIES)
    for file, count in ((Terminal(), 3), (io.StringIO(), 1)):
        monkeypatch.setattr("sys.stderr", file)
        console.warn(text)
        lines = file.getvalue().splitlines()
        assert len(lines) == count and " ".join(line.strip() for line in lines) == f"warning: {text}"
    command = f"next: kvscope replay {'long ' * 20}"
    for file in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", file)
        console.note(command)
        assert len(file.getvalue().splitlines()) == 1, "a command to copy is not broken"

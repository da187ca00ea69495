"""Tables: columns are left out rather than broken, and an untouched cache is never shown as a measurement."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvscope.cli import console
from kvscope.cli.console import ALWAYS, Column, fit, show_json, show_table
from kvscope.cli.policies import in_lines
from kvscope.cli.summary import columns, notes
from kvscope.core.output import size
from kvscope.core.records import MetricRecord
from kvscope.core.summary_records import SUMMARY, RunSummary
from tests.results.make import info

NAMES = (
    "retained_mass",
    "retained_mass_no_sinks",
    "ideal_mass",
    "ideal_cosine",
    "full_cosine",
    "mask_cosine",
    "ideal_recall",
    "read_keys",
    "held_keys",
)


def a_run(policy: str = "a2sf", count: int = 4096, **more: object) -> RunSummary:
    mean = 0.95943 if count else None
    data = {
        "run": 0,
        "policy": policy,
        "label": policy,
        "params": {},
        "budget": "20%",
        "budget_keys": 103,
        "prefill": "full",
        "phase": "step",
        "loop": "open",
        "metrics": {name: {"mean": mean, "low": None, "high": None, "count": count} for name in NAMES},
    }
    return SUMMARY.decode(data | more, Path("summary.json"), RunSummary)


DECLARED = {name: MetricRecord("higher", (0, 1), None if name == "mask_cosine" else 1.0) for name in NAMES}
RECORD = info([640])


def cells(table: list[Column], header: str) -> list[str]:
    return next(column.cells for column in table if column.header.replace("\n", " ") == header)


def test_every_column_that_is_promised() -> None:
    headers = [column.header.replace("\n", " ") for column in columns([a_run()], DECLARED)]
    assert headers == [
        "policy", "budget", "keys", "read", "held", "retained mass", "without sinks", "ideal mass", "ideal cosine",
        "full cosine", "mask cosine", "ideal recall", "loop", "prefill", "count",
    ]  # fmt: skip


def test_a_run_that_evicted_nothing_shows_declared_values_dimmed() -> None:
    runs = [a_run(), a_run("full", count=0, budget=None, budget_keys=[640, 700])]
    table = columns(runs, DECLARED)
    assert cells(table, "retained mass") == ["0.959", "1.000"]
    assert cells(table, "mask cosine") == ["0.959", "-"]
    assert cells(table, "count") == ["4,096", "0"]
    assert cells(table, "budget") == ["20%", "-"]
    assert cells(table, "keys") == ["103", "640-700"]
    dimmed = {column.header.replace("\n", " ") for column in table if column.dim == {1}}
    assert {"retained mass", "ideal cosine", "ideal recall"} <= dimmed
    assert any("nothing was evicted" in line for line in notes(runs, RECORD))
    assert not any("nothing was evicted" in line for line in notes(runs[:1], RECORD))


def note_of_belady(runs: list[RunSummary]) -> str:
    return next(column.note for column in columns(runs, DECLARED) if column.header == "of\nbelady")


def test_the_share_of_the_best_schedule_is_shown_where_it_is_known() -> None:
    known = {"share_of_belady": 0.84, "belady_of_ideal": 0.9}
    unknown = {"share_of_belady": None, "belady_of_ideal": None}
    runs = [a_run(bounds=known), a_run("ideal", bounds=known | {"share_of_belady": 1.1}, clairvoyant=True)]
    runs.append(a_run("full", count=0, budget=None, bounds=unknown))
    assert cells(columns(runs, DECLARED), "of belady") == ["0.840", "1.100", "-"]
    line = note_of_belady(runs)
    assert "0.900 times the mass of the ideal set" in line and "above 1" not in line
    runs.append(a_run("snapkv", bounds={"share_of_belady": 1.01, "belady_of_ideal": 0.95}))
    line = note_of_belady(runs)
    assert "0.900 to 0.950" in line and "above 1" in line
    for without in ([a_run()], [a_run(bounds=unknown)]):
        assert not any(column.header == "of\nbelady" for column in columns(without, DECLARED))
        assert not any("belady" in line for line in notes(without, RECORD))


@pytest.mark.parametrize("width", [45, 200])
def test_a_note_is_shown_with_its_column_only(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    table = columns([a_run(bounds={"share_of_belady": 0.84, "belady_of_ideal": 0.9})], DECLARED)
    show_table(table, notes=["open loop."])
    out = capsys.readouterr().out
    head, _, under = out.partition("open loop.")
    assert ("belady" in head) == ("Of belady: " in under) == (width == 200)


def test_a_column_without_measured_values_is_dropped_first() -> None:
    runs = [a_run(), a_run("full", count=0, budget=None)]
    none = replace(runs[0].metrics["ideal_recall"], mean=None, count=0)
    runs[0] = replace(runs[0], metrics={**runs[0].metrics, "late_mass_retained": none})
    table = columns(runs, DECLARED)
    width = sum(column.width() for column in table) - console.GAP
    assert [column.header for column in fit(table, width - 1)[1]] == ["late\nmass"]


def test_intervals_of_lengths_are_not_shown() -> None:
    run = a_run()
    both = {name: replace(run.metrics[name], low=0.9, high=0.99) for name in ("read_keys", "held_keys")}
    table = columns([replace(run, metrics={**run.metrics, **both})], DECLARED)
    assert cells(table, "read") == cells(table, "held") == ["1.0"]


def test_intervals_are_shown_where_there_are_any() -> None:
    run = a_run()
    interval = replace(run.metrics["retained_mass"], low=0.95, high=0.97)
    run = replace(run, metrics={**run.metrics, "retained_mass": interval})
    assert cells(columns([run], DECLARED), "retained mass") == ["0.959\n0.950..0.970"]
    assert any("95 % interval" in line for line in notes([run], RECORD))


@pytest.mark.parametrize("width", [100, 80, 60])
def test_no_line_is_wider_than_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    runs = [
        a_run("streaming-llm"),
        a_run("a2sf", label="a2sf(alpha=0.7, recent=16, group=max)"),
        a_run("full", 0),
    ]
    show_table(columns(runs, DECLARED), notes=notes(runs, RECORD))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert "streaming-llm" in out
    assert "…" not in out, "a cell was cut: a column should have gone instead"
    assert "Columns that do not fit: " in out
    shown = {text for text in ("retained", "cosine", "recall") if text in out}
    assert shown == {"retained", "cosine", "recall"}, "never one score alone"


def test_a_pipe_gets_every_column(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    show_table(columns([a_run()], DECLARED))
    out = capsys.readouterr().out
    assert "Too narrow" not in out
    assert "prefill" in out


def test_fit_drops_the_least_first_and_keeps_the_order() -> None:
    table = [
        Column("a", ["1"]),
        Column("bbbb", ["1"], keep=2),
        Column("cccc", ["1"], keep=1),
        Column("d", ["1"]),
    ]
    assert [c.header for c in fit(table, 100)[0]] == ["a", "bbbb", "cccc", "d"]
    shown, left_out = fit(table, 10)
    assert [c.header for c in shown] == ["a", "bbbb", "d"]
    assert [c.header for c in left_out] == ["cccc"]
    assert [c.header for c in fit(table, 1)[0]] == ["a", "d"]
    assert all(c.keep == ALWAYS for c in fit(table, 1)[0])


def test_json_has_null_for_what_json_cannot_say(capsys: pytest.CaptureFixture[str]) -> None:
    show_json({"a": float("nan"), "b": [float("inf"), 1.5], "c": ("ü", None)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": ["ü", None]}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (4.3e9, "4.3 GB"), (5e15, "5000.0 TB")],
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_shows_rate_and_time_left_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(file: io.StringIO, quiet: bool) -> str:
        monkeypatch.setattr("sys.stderr", file)
        with console.bar("replaying", 100, "tokens", quiet=quiet) as update:
            update(40, "1.0 MB")
            update(100, "2.0 MB")
        return file.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = drawn(Terminal(), quiet=False)
    assert "100%" in shown
    assert "tokens/s" in shown
    assert "2.0 MB" in shown
    assert drawn(Terminal(), quiet=True) == ""
    assert drawn(io.StringIO(), quiet=False) == ""


def test_a_bar_shows_elapsed_time_first_and_the_time_left_from_the_first_part_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stderr", file := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with console.bar("replaying", 100, "tokens") as update:
        pass
    assert "0:00:00" in file.getvalue() and "left" not in file.getvalue() and "-:--" not in file.getvalue()
    with console.bar("replaying", 100, "tokens") as update:
        update(1)
    assert " left" in file.getvalue()


@pytest.mark.parametrize(
    ("seconds", "done", "total", "text"),
    [
        (10, 0, 100, ""),
        (10, 100, 100, ""),
        (10, 5, None, ""),
        (10, 10, 100, "1:30 left"),
        (1, 50, 100, "0:01 left"),
        (3600, 25, 100, "3:00:00 left"),
    ],
)
def test_time_left(seconds: float, done: float, total: float | None, text: str) -> None:
    assert console._left(seconds, done, total) == text


def test_calls_are_broken_where_python_may_break_them() -> None:
    call = "ComposedPress(presses=[KnormPress(compression_ratio=0.2), KeyDiffPress(compression_ratio=0.2)])"
    lines = in_lines(call, 38).split("\n")
    assert len(lines) > 2 and max(map(len, lines)) <= 38
    assert all(line.endswith(("(", "[", ",")) for line in lines[:-1]), lines
    assert "".join(lines).replace(" ", "") == call.replace(" ", "")
    assert in_lines("KnormPress()", 38) == "KnormPress()"

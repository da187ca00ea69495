"""The tables that a replay prints: the best policies, then the rows in the order and with the columns named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import kvscope
from kvscope.cli.best import HEADERS, show_best
from kvscope.cli.best import columns as best_columns
from kvscope.cli.summary import COLUMNS, columns, selected
from kvscope.cli.table_rows import arranged
from kvscope.core.summary_records import MetricSummary
from kvscope.results.ranking import Best, best_of
from kvscope.results.store import Replay
from tests.cli.conftest import Run

EXAMPLE = Path(__file__).parents[2] / "traces" / "example"
NAMES = ["h2o", "window", "tova", "quest"]


@pytest.fixture(scope="module")
def replay() -> Replay:
    return kvscope.replay(kvscope.open(EXAMPLE), NAMES, "10%,30%")


def labels(replay: Replay, sort: str | None = None, top: int | None = None) -> list[tuple[str | None, str]]:
    summary = replay.summary
    return [(run.budget, run.label) for run in arranged(summary.runs, summary.metrics, sort, top)]


def test_rows_are_sorted_within_each_budget(replay: Replay) -> None:
    frame = replay.frame()
    for metric, ascending in (("retained_mass", False), ("output_error", True)):
        expected = [
            (budget, label)
            for budget in ("10%", "30%")
            for label in frame[frame.budget == budget].sort_values(metric, ascending=ascending)["policy"]
        ]
        assert labels(replay, metric) == expected
    assert labels(replay) == labels(replay, "retained-mass")
    assert len(labels(replay, top=1)) == 2


def test_policies_are_in_the_order_of_their_closed_runs(replay: Replay) -> None:
    summary = replay.summary
    first, second = [run for run in summary.runs if run.budget == "10%"][:2]
    means = [0.9, 0.1, 0.2, 0.8]  # the two open runs, then the two closed runs
    closed = [dataclasses.replace(run, run=90 + run.run, open_run=run.run, loop="closed") for run in (first, second)]
    runs = [
        dataclasses.replace(run, metrics={"retained_mass": MetricSummary(mean, count=3)})
        for run, mean in zip([first, second, *closed], means, strict=True)
    ]
    order = arranged(runs, summary.metrics, None, None)
    assert [(run.label, run.loop) for run in order] == [
        *((second.label, "open"), (second.label, "closed")),
        *((first.label, "open"), (first.label, "closed")),
    ]


@pytest.mark.parametrize("metric", ["retained_mass", "output_error"])
def test_runs_without_a_value_are_last(replay: Replay, metric: str) -> None:
    summary = replay.summary
    first, *others = [run for run in summary.runs if run.budget == "10%"]
    order = arranged([dataclasses.replace(first, metrics={}), *others], summary.metrics, metric, None)
    assert order[-1].label == first.label


def test_columns_that_are_named(replay: Replay) -> None:
    table = columns(replay.summary.runs, replay.summary.metrics)
    assert [column.header for column in selected(table, "held,output-error")] == [
        *("policy", "budget", "held"),
        "output\nerror",
    ]
    assert selected(table, None) == table


def test_every_column_has_a_name(replay: Replay) -> None:
    table = columns(replay.summary.runs, replay.summary.metrics)
    assert len(selected(table, ",".join(COLUMNS))) == len(table)


@pytest.mark.parametrize("width", [80, 120])
def test_read_and_held_are_shown_where_kinds_are_mixed(run: Run, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shown = run("replay", str(EXAMPLE), *(part for name in NAMES for part in ("--policy", name)), "--budget", "10%")
    head = next(line for line in shown.out.splitlines() if line.startswith("policy"))
    assert " read " in head and " held " in head
    assert "best policy" in shown.out and "reads a part" not in shown.out, "quest is alone in its kind"
    assert "The metrics disagree at 10% (every step)" in shown.out.replace("\n", " ").replace("  ", " ")


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_best_by_every_metric_is_shown_at_every_width(
    replay: Replay, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    show_best(replay.summary)
    shown = capsys.readouterr().out
    assert "Too narrow" not in shown and max(map(len, shown.splitlines())) <= width
    for best in best_of(replay.summary.runs, replay.summary.metrics):
        assert {"output_error", "late_mass_retained", "retained_mass"} <= set(best.winners)
        for name, (value, who) in best.winners.items():
            (line,) = [line for line in shown.splitlines() if f"{value:.3f} " in line]
            assert ", ".join(who) in line
            if width == 60:
                assert HEADERS[name].replace("\n", " ") in line


@pytest.mark.parametrize(("count", "who"), [(1, "a"), (2, "a, b"), (3, "3 policies"), (4, "4 policies")])
def test_of_more_than_two_that_share_the_place_the_number_is_shown(count: int, who: str) -> None:
    best = Best("30%", "every step", "open", "full", 5, {"retained_mass": (0.9, tuple("abcd"[:count]))})
    assert best_columns([best])[-1].cells == [f"0.900 {who}"]


def test_no_line_of_the_best_begins_with_a_label(
    replay: Replay, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    summary = replay.summary
    runs = [dataclasses.replace(run, label=f"::error::{run.label}-{'x' * 30}") for run in summary.runs]
    show_best(dataclasses.replace(summary, runs=runs))
    shown = capsys.readouterr().out
    assert shown.count(r":\:error::") == shown.count("… xxx") == 6
    assert max(map(len, shown.splitlines())) <= 80
    assert not any(line.lstrip().startswith(("::", "x")) for line in shown.splitlines())


def test_wide_prints_every_column(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    narrow = run("replay", str(EXAMPLE), "--policy", "h2o", "--budget", "10%")
    wide = run("replay", str(EXAMPLE), "--policy", "h2o", "--budget", "10%", "--wide", "--force")
    assert "Columns that do not fit" in narrow.out and "Columns that do not fit" not in wide.out
    assert max(map(len, wide.out.splitlines())) > 100


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--sort", "mas", "no metric 'mas' to sort by"),
        ("--columns", "hold", "no column 'hold'"),
        ("--top", "0", "--top"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_is_written(run: Run, option: str, value: str, says: str) -> None:
    found = run("replay", str(EXAMPLE), "--policy", "h2o", option, value)
    assert found.status == 2 and says in found.err
    assert not Path("reports").exists()

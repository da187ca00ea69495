"""What each panel says, as plain data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from kvscope.report.encoding import unpacked
from kvscope.report.page import page_data
from kvscope.report.panels.budget_curve import budget_curve
from kvscope.report.panels.head_map import head_map
from kvscope.report.panels.provenance import GENERATED, OPEN_LOOP, provenance
from kvscope.report.panels.residency_raster import residency_raster, spread, stays
from kvscope.report.panels.summary_table import summary_table
from kvscope.report.source import Limits, ReportInput
from kvscope.trace.reader import Trace
from tests.report.make import LENGTH, MASS, make_replay, make_trace


def row(data: dict[str, Any], label: str, budget: str | None) -> dict[str, Any]:
    return next(row for row in data["rows"] if (row["label"], row["budget"]) == (label, budget))


def test_summary_row(source: ReportInput) -> None:
    assert row(summary_table(source), "tova", "2") == {
        "id": "0.3",
        "replay": "small",
        "policy": "tova",
        "label": "tova",
        "budget": "2",
        "budget_keys": 2.0,
        "loop": "open",
        "prefill": "full",
        "phase": "step",
        "values": {
            "retained_mass": {"mean": 0.625, "low": None, "high": None, "count": 24},
            "ideal_mass": {"mean": 0.92, "low": None, "high": None, "count": 24},
            "output_error": {"mean": 0.375, "low": None, "high": None, "count": 24},
            "held_keys": {"mean": 2.0, "low": None, "high": None, "count": 24},
        },
        "marks": {"retained_mass": "best", "output_error": "best"},
    }


def test_summary_order_is_budget_then_fidelity_and_no_budget_comes_last(source: ReportInput) -> None:
    assert [(row["label"], row["budget"]) for row in summary_table(source)["rows"]] == [
        ("tova", "2"),
        ("h2o", "2"),
        ("window", "2"),
        ("tova", "4"),
        ("h2o", "4"),
        ("window", "4"),
        ("full", None),
    ]


def test_best_and_last_are_marked_within_a_budget(source: ReportInput) -> None:
    data = summary_table(source)
    marks = {(row["label"], row["budget"]): row["marks"] for row in data["rows"]}
    both = {
        "best": {"retained_mass": "best", "output_error": "best"},
        "last": {"retained_mass": "last", "output_error": "last"},
    }
    assert marks[("tova", "4")] == both["best"]
    assert marks[("window", "2")] == both["last"]
    assert marks[("h2o", "2")] == marks[("full", None)] == {}


def test_runs_of_different_prefill_are_not_compared(trace: Trace, tmp_path: Path) -> None:
    one = {"h2o": {"2": 0.5}}
    replays = [make_replay(tmp_path / prefill, trace, mass=one, prefill=prefill) for prefill in ("full", "stream")]
    data = summary_table(ReportInput(tuple(replays)))
    assert all(row["marks"] == {} for row in data["rows"])
    assert data["headlines"] == []
    assert data["several"]


def test_headline_names_the_best_of_each_budget(source: ReportInput) -> None:
    first = summary_table(source)["headlines"][0]
    assert (first["budget"], first["of"]) == ("2", 3)
    assert first["best"][0] == {"metric": "retained mass", "value": 0.625, "labels": ["tova"]}


def test_summary_says_why_there_is_no_interval_and_what_is_left_out(source: ReportInput) -> None:
    assert summary_table(source)["notes"] == ["No intervals: they need five or more sequences."]
    notes = summary_table(replace(source, limits=Limits(rows=5)))["notes"]
    assert notes[0] == "The table shows 5 of 7 rows; the others are in summary.json."


def test_intervals_come_with_five_sequences(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "trace", sequences=5)
    data = summary_table(ReportInput((make_replay(tmp_path / "replay", trace, mass={"h2o": {"2": 0.5}}),)))
    value = data["rows"][0]["values"]["retained_mass"]
    assert value["low"] == value["high"] == pytest.approx(0.5)
    assert data["notes"] == []


def test_metrics_stand_in_reading_order_with_cost_last(source: ReportInput) -> None:
    assert [metric["name"] for metric in source.metric_list()] == [
        "retained_mass",
        "ideal_mass",
        "output_error",
        "held_keys",
    ]


def test_curve_has_a_point_per_budget_and_a_line_per_policy(source: ReportInput) -> None:
    data = budget_curve(source)
    assert [line["name"] for line in data["lines"]] == ["h2o", "tova", "window"]
    line = data["lines"][1]
    assert (line["keys"], line["budgets"]) == ([2.0, 4.0], ["2", "4"])
    assert line["values"]["retained_mass"] == [[0.625, None, None], [0.875, None, None]]
    assert data["references"] == {"retained_mass": [{"name": "ideal", "keys": [2.0, 4.0], "values": [0.92, 0.94]}]}
    assert data["notes"] == ["Without a budget, and so without a line: full."]


def test_curve_of_one_budget_says_how_to_get_a_line(trace: Trace, tmp_path: Path) -> None:
    data = budget_curve(ReportInput((make_replay(tmp_path / "one", trace, mass={"h2o": {"2": 0.5}}),)))
    assert data["notes"] == ["Only one budget was replayed: lines need two or more, for instance --budget 10%,20%,40%."]


def test_map_is_the_mean_per_layer_and_head(source: ReportInput) -> None:
    data = head_map(source)
    assert data["first"] == "0.3"
    made = next(each for each in data["maps"] if each["id"] == "0.3")
    assert (made["name"], made["layers"], made["heads"], made["group"]) == ("tova · 2", [0, 1], 4, 2)
    assert made["values"]["retained_mass"] == [[0.6, 0.61, 0.62, 0.63], [0.62, 0.63, 0.64, 0.65]]
    full = next(each for each in data["maps"] if each["id"] == "0.0")
    assert full["values"]["retained_mass"] == [[None] * 4] * 2
    assert data["scale"]["retained_mass"] == [0.225, 0.9]


def test_map_limit_is_said(source: ReportInput) -> None:
    data = head_map(replace(source, limits=Limits(map_values=2 * 32)))
    assert [each["id"] for each in data["maps"]] == ["0.0", "0.1"]
    assert data["notes"] == ["Maps of 5 of 7 runs are left out to keep the page small; fidelity.parquet has them."]


def resident(raster: dict[str, Any], length: int = LENGTH) -> np.ndarray:
    """Return ``[G, T, T]`` as `Replay.resident` does, from what the page carries."""
    leave = unpacked(raster["leave"])
    counts = raster["counts"] or [length] * raster["stored"]
    key = unpacked(raster["key"]) if "key" in raster else np.tile(np.arange(length), raster["stored"])
    enter = unpacked(raster["enter"]) if "enter" in raster else key
    mask = np.zeros((raster["stored"], length, length), bool)
    head = np.repeat(np.arange(raster["stored"]), counts)
    for at in range(len(leave)):
        mask[head[at], enter[at] : leave[at] if leave[at] >= 0 else length, key[at]] = True
    return np.broadcast_to(mask, (raster["heads"], length, length)) if raster["stored"] == 1 else mask


def test_raster_carries_what_the_replay_holds(source: ReportInput) -> None:
    data = residency_raster(source)
    assert len(data["rasters"]) == 2 * len(source.runs)
    for raster in data["rasters"]:
        expected = source.replays[0].resident(int(raster["run"].split(".")[1]), 0, raster["layer"])
        np.testing.assert_array_equal(resident(raster), expected)
    assert data["notes"] == []
    assert data["first"] == "0.3"
    assert "bytes" not in data["rasters"][0]
    assert data["sequences"] == {
        "0.0": {"prompt": 3, "length": 6, "tokens": ["The", "␣king", "↵", "␣said", "␣4", "821"]}
    }


def test_heads_that_agree_are_carried_once_and_only_leaving_steps_are_needed(source: ReportInput) -> None:
    raster = residency_raster(source)["rasters"][0]
    assert (raster["stored"], raster["heads"], raster["counts"]) == (1, 2, None)
    assert set(raster) == {"run", "sequence", "layer", "heads", "stored", "counts", "leave"}


def test_keys_that_come_back_keep_every_stay() -> None:
    frame = pd.DataFrame(
        {
            "kv_head": [1, 0, 0, 0, 1, 1, 1],
            "key": [2, 0, 1, 2, 0, 0, 1],
            "enter": [2, 0, 1, 2, 0, 2, 1],
            "leave": pd.array([None, None, 1, None, 1, None, 2], dtype="Int32"),
        }
    )
    raster = stays(frame, heads=2, length=3)
    expected = np.array([[[1, 0, 0], [1, 0, 0], [1, 0, 1]], [[1, 0, 0], [0, 1, 0], [1, 0, 1]]], bool)
    np.testing.assert_array_equal(resident(raster, 3), expected)
    assert raster["counts"] == [3, 4]


def test_long_sequences_need_more_than_16_bit() -> None:
    length = 40_000
    keys = np.arange(length)
    frame = pd.DataFrame({"kv_head": 0, "key": keys, "enter": keys, "leave": np.where(keys < 9, length - 1, -1)})
    raster = stays(frame, heads=1, length=length)
    assert raster["leave"]["dtype"] == "int32"
    assert unpacked(raster["leave"]).tolist() == [length - 1] * 9 + [-1] * (length - 9)


LIMITED = "rasters of all layers, sequences and replays are limited to {} bytes. residency.parquet has all of them."


def test_raster_limit_is_said_and_keeps_runs_comparable(source: ReportInput) -> None:
    texts = sum(len(text.encode()) for text in ["The", "␣king", "↵", "␣said", "␣4", "821"])
    limit = texts + len(source.runs) * LENGTH * 2 + 1
    data = residency_raster(replace(source, limits=Limits(raster_bytes=limit)))
    assert {raster["layer"] for raster in data["rasters"]} == {0}
    assert {raster["run"] for raster in data["rasters"]} == {run.id for run in source.runs}
    assert data["notes"] == [f"1 of 2 layers are shown: {LIMITED.format(limit)}"]


def test_a_layer_that_does_not_fit_has_the_best_runs(source: ReportInput) -> None:
    limit = 100
    data = residency_raster(replace(source, limits=Limits(raster_bytes=limit)))
    assert [raster["run"] for raster in data["rasters"]] == [run.id for run in source.ranking[: len(data["rasters"])]]
    shown = len(data["rasters"])
    assert 0 < shown < len(source.runs)
    assert data["notes"] == [f"{shown} of 7 runs are shown, in 1 of 2 layers: {LIMITED.format(limit)}"]
    assert residency_raster(replace(source, limits=Limits(raster_bytes=1)))["rasters"] == []


def test_layers_that_fit_are_spread_over_the_depth() -> None:
    assert spread(range(9)) == [0, 8, 4, 2, 6, 1, 3, 5, 7]
    assert spread([5]) == [5]
    assert sorted(spread(range(32))) == list(range(32))


def test_absent_trace_is_said_and_the_rest_still_shows(source: ReportInput) -> None:
    without = replace(source, traces={})
    data = residency_raster(without)
    assert data["sequences"]["0.0"]["tokens"] is None
    assert data["notes"] == ["Token text is missing: the trace of small is not at hand."]
    assert len(data["rasters"]) == 2 * len(source.runs)
    assert [each["kind"] for each in provenance(without)["sources"]] == ["replay"]
    assert "not at hand" in provenance(without)["notes"][0]


def test_provenance_names_model_prompt_versions_and_command(source: ReportInput) -> None:
    data = provenance(source)
    replay, trace = data["sources"]
    assert dict(replay["facts"])["command"] == "kvscope replay --policy h2o"
    assert dict(replay["facts"])["versions"] == "kvscope 0.1.0, numpy 2"
    facts = dict(trace["facts"])
    assert (facts["model"], facts["revision"], facts["seed"], facts["recorded layers"]) == ("tiny", "abc", "7", "all 2")
    assert trace["prompts"] == [{"file": "prompt.txt", "sha256": "c" * 64}]
    assert data["approximate"][:2] == [OPEN_LOOP, GENERATED]


def test_paths_of_the_machine_stay_out_of_the_page(source: ReportInput) -> None:
    assert str(source.replays[0].path.parent) not in str(page_data(source))


def test_replays_of_one_name_are_told_apart(trace: Trace, tmp_path: Path) -> None:
    one = {"h2o": {"2": 0.5, "4": 0.6}}
    replays = tuple(make_replay(tmp_path / folder / "same", trace, mass=one) for folder in ("a", "b"))
    data = ReportInput(replays)
    assert data.names == ("same (1)", "same (2)")
    assert [line["name"] for line in budget_curve(data)["lines"]] == ["h2o · same (1)", "h2o · same (2)"]
    assert len({run.id for run in data.runs}) == 4


def test_mass_table_of_the_fixture_is_what_the_summary_reads(source: ReportInput) -> None:
    expected = {(policy, budget): value for policy, values in MASS.items() for budget, value in values.items()}
    found = {(run.label, run.budget): run.mean("retained_mass") for run in source.runs}
    assert found == pytest.approx(expected)

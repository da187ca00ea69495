"""Figures for notebooks: the numbers of the replay, and errors that say what there is."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import kvscope
from kvscope.core.errors import ResultError, UsageError
from kvscope.report.colours import DASHES, MARKERS, PALETTE
from kvscope.report.source import ReportInput
from kvscope.report.template import asset
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace
from tests.report.make import make_replay
from tests.report.test_summary_panels import run_of
from tests.results.make import with_summary


def test_budget_curve_has_a_line_per_policy_against_the_keys_held(replay: Replay) -> None:
    figure = kvscope.plot(replay, "budget_curve")
    lines = {line.name: line for line in figure.data}
    assert list(lines) == ["h2o", "tova", "window"]
    assert list(lines["tova"].x) == [2.0, 4.0]
    np.testing.assert_allclose(lines["tova"].y, [0.625, 0.875])
    assert figure.layout.yaxis.title.text == "retained mass (higher is better)"


def test_a_replay_draws_itself_in_a_notebook(replay: Replay) -> None:
    assert kvscope.plot(replay) == kvscope.plot(replay, "budget_curve")


def test_a_replay_shows_its_summary_in_a_notebook(trace: Trace, tmp_path: Path) -> None:
    mass = {"h2o": {"2": 0.5}, "tova": {"4": None}}
    shown = make_replay(tmp_path / "r", trace, mass=mass, labels={"h2o": "<img src=x>"})._repr_html_()
    assert "<b>r</b>: 2 runs" in shown and "retained mass" in shown
    cells = re.findall(r"<td>(.*?)</td>", shown)
    assert cells[:3] == ["&lt;img src=x&gt;", "2", "open"]
    assert "0.5" in cells and "nan" not in shown.lower()


def test_lines_that_the_page_does_not_show_at_first_wait_in_the_legend(rich: ReportInput) -> None:
    figure = kvscope.plot(rich.replays[0])
    visible = {line.name: line.visible for line in figure.data}
    assert visible["h2o"] is True
    assert visible["a2sf:alpha=0.1"] == "legendonly"
    assert next(line for line in figure.data if line.name == "belady").line.dash == "dash"


def test_head_map_is_one_run_by_layer_and_head(replay: Replay) -> None:
    (heat,) = kvscope.plot(replay, "head_map", metric="output_error", run=3).data
    assert np.asarray(heat.z).shape == (2, 4)
    assert heat.z[0][0] == pytest.approx(0.4)


def test_over_time_shows_the_runs_of_one_budget(replay: Replay) -> None:
    figure = kvscope.plot(replay, "over_time", run=3)
    assert {line.name for line in figure.data} == {"h2o", "tova", "window"}
    line = next(line for line in figure.data if line.name == "tova")
    assert list(line.x) == [3, 4, 5]
    np.testing.assert_allclose(line.y, 0.625, atol=1e-6)


def test_several_replays_share_a_figure(rich: ReportInput) -> None:
    names = [line.name for line in kvscope.plot(rich.replays).data]
    assert len(names) == len(set(names)) == 17
    assert replace(rich).names == ("open", "closed")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("budget_curv", {}, "Did you mean budget_curve"),
        ("head_map", {"metric": "retained_mas"}, "Did you mean retained_mass"),
        ("head_map", {"run": 99}, "has no run 99"),
    ],
)
def test_what_there_is_not_is_an_error(replay: Replay, name: str, options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        kvscope.plot(replay, name, **options)
    assert says in f"{caught.value.what} {caught.value.todo}"


def test_a_run_without_values_is_an_error(replay: Replay) -> None:
    with pytest.raises(ResultError, match="no value to show"):
        kvscope.plot(replay, "head_map", run=0)
    with pytest.raises(AttributeError):
        _ = kvscope.report.no_such_thing


def test_lines_of_the_page_and_of_figures_have_the_same_look(replay: Replay) -> None:
    code = asset("core.js")
    light = re.search(r"light: (\[.*?\])", code)
    assert light and tuple(json.loads(light[1])) == PALETTE
    assert tuple(json.loads(re.search(r"MARKERS = (\[.*?\])", code)[1])) == MARKERS  # type: ignore[index]
    assert tuple(json.loads(re.search(r"DASHES = (\[.*?\])", code)[1])) == DASHES  # type: ignore[index]
    colours = {line.name: line.line.color for line in kvscope.plot(replay).data}
    assert colours["tova"] == PALETTE[ReportInput((replay,)).labels.index("tova")]


def test_axis_and_policies_of_the_budget_curve_can_be_chosen(rich: ReportInput) -> None:
    figure = kvscope.plot(rich.replays[0], against="share", policies=["h2o", "quest"])
    shown = {line.name: line for line in figure.data if line.visible is True}
    assert set(shown) == {"h2o", "quest"}
    np.testing.assert_allclose(shown["h2o"].x, [4 / 17.5, 8 / 17.5])
    with pytest.raises(UsageError, match="no axis is called 'shard'"):
        kvscope.plot(rich.replays[0], against="shard")


def test_policies_that_hold_every_key_are_in_a_strip(trace: Trace, tmp_path: Path) -> None:
    replay = make_replay(tmp_path / "r", trace, mass={"h2o": {"2": 0.5, "4": 0.6}, "quest": {"2": 0.5, "4": 0.6}})
    assert "xaxis2" not in kvscope.plot(replay).layout
    for number in (2, 3):
        metrics = replay.summary.runs[number].metrics
        replay = with_summary(replay, number, metrics={**metrics, "held_keys": replace(metrics["held_keys"], mean=5.0)})
    figure = kvscope.plot(replay, policies=["h2o", "quest"])
    assert {line.name: (line.xaxis, list(line.x)) for line in figure.data} == {
        "h2o": ("x", [2.0, 4.0]),
        "quest": ("x2", ["2", "4"]),
    }
    assert figure.layout.xaxis2.domain[0] > figure.layout.xaxis.domain[1]


def test_residency_is_what_one_head_or_all_hold(rich: ReportInput) -> None:
    h2o = run_of(rich, "h2o", "4")
    figure = kvscope.plot(rich.replays, "residency", run=h2o.number, layer=1, head=3)
    (heat,) = figure.data
    held = rich.residency(rich.parts["0.0"], 1)[h2o.id]
    assert list(heat.x) == list(range(9, 24)), "from the end of the prompt of ten tokens"
    for column, step in enumerate(heat.x):
        of_head = held.held_after(int(step)).reshape(2, 24)[1]
        expected = [float(there) if key <= step else None for key, there in enumerate(of_head)]
        assert [None if np.isnan(value) else value for value in heat.z[:, column]] == expected
    assert figure.layout.title.text.endswith("layer 1, key/value head 1")
    with pytest.raises(UsageError, match="no layer 7"):
        kvscope.plot(rich.replays, "residency", layer=7)


def test_agreement_leaves_its_diagonal_empty(rich: ReportInput) -> None:
    (heat,) = kvscope.plot(rich.replays[0], "agreement", run=run_of(rich, "h2o", "4").number).data
    assert np.isnan(np.diagonal(heat.z)).all() and not np.isnan(heat.z[0][1])
    assert heat.text[0][1] == f"{heat.z[0][1]:.2f}" and heat.text[0][0] == ""


@pytest.mark.parametrize("name", ["outcome", "answers", "sweep", "queries", "norms", "inspector"])
def test_every_panel_of_the_page_is_a_figure(rich: ReportInput, name: str) -> None:
    figure = kvscope.plot(rich.replays, name, traces=rich.traces, step=20)
    assert figure.data and figure.layout.xaxis.title.text


def test_depth_is_a_figure(gated: ReportInput) -> None:
    figure = kvscope.plot(gated.replays, "depth")
    assert [list(line.x) for line in figure.data] == [[0, 1]] * 3


def test_panels_that_the_page_does_not_show_are_no_figures(replay: Replay) -> None:
    for name, todo in {"outcome": "--perplexity", "sweep": "--alpha", "norms": "trace", "inspector": "trace"}.items():
        with pytest.raises(ResultError, match="the replay has no") as caught:
            kvscope.plot(replay, name)
        assert todo in caught.value.todo


def test_spans_are_a_map_of_the_steps_at_which_half_is_lost(rich: ReportInput) -> None:
    run = run_of(rich, "h2o", "4").number
    figure = kvscope.plot(rich.replays, "spans", run=run, traces=rich.traces)
    (heat,) = figure.data
    assert heat.z.tolist() == [[9.0, 9.0], [9.0, 9.0]] and heat.text[0][0] == "9"
    assert figure.layout.title.text.startswith("needle, h2o")
    with pytest.raises(UsageError, match="no span is called 'fact'"):
        kvscope.plot(rich.replays, "spans", run=run, traces=rich.traces, span="fact")

"""Figures for notebooks: the numbers of the replay, and errors that say what there is."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import kvscope
from kvscope.core.errors import ResultError, UsageError
from kvscope.report.source import ReportInput
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace
from tests.report.make import make_replay


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

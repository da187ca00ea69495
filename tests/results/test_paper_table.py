"""Tables for papers: the best is bold among its rivals only, and names cannot break the syntax."""

from pathlib import Path

import numpy as np
import pytest

from kvscope.core.errors import UsageError
from kvscope.results.export import export
from kvscope.results.paper_table import as_latex, as_markdown, paper_table
from kvscope.results.store import Replay
from kvscope.results.summary import MetricSummary
from tests.results.make import make, with_summary

LENGTHS = [6, 7, 8, 6, 7, 9]


@pytest.fixture
def replay(tmp_path: Path) -> Replay:
    return make(tmp_path / "r", LENGTHS)


def set_mean(replay: Replay, run: int, mean: float) -> Replay:
    metrics = {**replay.summary.runs[run].metrics, "retained_mass": MetricSummary(mean, mean - 0.1, mean + 0.1, 9)}
    return with_summary(replay, run, metrics=metrics)


def bold_of(replay: Replay, name: str) -> list[int]:
    table = paper_table(replay.summary)
    return sorted(row for row, column in table.bold if table.head[column] == name)


def test_cells_are_means_and_intervals(replay: Replay) -> None:
    table = paper_table(set_mean(replay, 0, 0.5).summary)
    assert table.head == ["policy", "budget", "loop", "held_keys", "retained_mass", "output_error"]
    assert table.rows[0][:3] == ["h2o", "50%", "open"] and table.rows[0][4] == "0.500 [0.400, 0.600]"
    error = replay.summary.runs[1].metrics["output_error"]
    assert table.rows[1][5] == f"{error.mean:.3f} [{error.low:.3f}, {error.high:.3f}]"
    assert table.note.startswith("stream prefill; 6 sequences of test/tiny; ")


def test_the_best_of_a_budget_is_bold(replay: Replay) -> None:
    assert bold_of(set_mean(set_mean(replay, 0, 0.9), 1, 0.2), "retained_mass") == [0]
    assert bold_of(set_mean(set_mean(replay, 0, 0.9), 1, 0.9001), "retained_mass") == [0, 1], "equal as they are shown"
    errors = [run.metrics["output_error"].mean for run in replay.summary.runs]
    assert bold_of(replay, "output_error") == [int(np.argmin(errors))], "lower is better"
    assert bold_of(replay, "held_keys") == [], "no direction is better"
    other = with_summary(replay, 1, budget="20%")
    assert paper_table(other.summary).bold == frozenset(), "no rival at the same budget"
    assert paper_table(with_summary(replay, 1, clairvoyant=True).summary).bold == frozenset()


def test_it_is_no_format_of_files(replay: Replay, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="markdown is one table"):
        export(replay, tmp_path / "out", form="markdown")


def test_markdown_and_latex(replay: Replay) -> None:
    named = set_mean(set_mean(with_summary(replay, 0, label="mine|x_y(a=5%)&"), 0, 0.9), 1, 0.2)
    markdown = as_markdown(paper_table(named.summary)).splitlines()
    assert markdown[1] == "| --- | ---: | ---: | ---: | ---: | ---: |"
    assert markdown[2].startswith("| mine\\|x\\_y(a=5%)\\& | 50% | open | ")
    assert "**0.900 \\[0.800, 1.000\\]**" in markdown[2]
    latex = as_latex(paper_table(named.summary)).splitlines()
    assert latex[0] == "\\begin{tabular}{lrrrrr}"
    assert latex[4].startswith("mine|x\\_y(a=5\\%)\\& & 50\\% & open & ")
    assert "\\textbf{0.900 [0.800, 1.000]}" in latex[4]
    assert {line.count(" & ") for line in latex[2:6] if "&" in line and "mine" not in line} == {5}
    assert latex[-1].startswith("% stream prefill")

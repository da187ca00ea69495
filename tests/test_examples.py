"""The examples in git are whole, say what they claim, and are what this code makes of them.

A change of decisions, metrics or the report that nobody meant shows here first. If it was meant: python
tools/examples.py, and python tools/screenshots.py
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal, assert_series_equal

from kvscope.cli.report import spans_of
from kvscope.core.options import ClosedLoopOptions
from kvscope.core.summary_records import RunSummary
from kvscope.replay.run import replay
from kvscope.report.encoding import unpacked
from kvscope.report.page import report
from kvscope.results.store import Replay, open_replay
from kvscope.trace.reader import Trace, open_trace
from tools.examples import SPANS

ROOT = Path(__file__).resolve().parent.parent
MEGABYTE = 1_000_000
COMPUTED = 2e-6  # by which floats of a report may differ: twice the last of its six digits for values near one


@pytest.fixture(scope="module")
def trace() -> Trace:
    return open_trace(ROOT / "traces" / "example", verify=True)


@pytest.fixture(scope="module")
def committed() -> Replay:
    return open_replay(ROOT / "reports" / "example", verify=True)


@pytest.fixture(scope="module")
def again(trace: Trace, committed: Replay, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """Return the same policies and budgets, replayed now in both loops; policies that came later are not in them."""
    policies = list(dict.fromkeys(run.label for run in committed.info.runs))
    budgets = list(dict.fromkeys(run.budget for run in committed.info.runs if run.budget is not None))
    output = tmp_path_factory.mktemp("replay") / "example"
    return replay(trace, policies, budgets, output=output, closed=ClosedLoopOptions(dtype="float32"))


def values(run: RunSummary) -> dict[str, float | None]:
    """Return what `summary.json` says of the metrics of one run, flat."""
    return {f"{name} {what}": value for name, stated in run.metrics.items() for what, value in vars(stated).items()}


def test_the_prompt_asks_for_its_facts_and_the_model_knows_the_last(trace: Trace) -> None:
    tokens = trace.tokens(0)
    prompt = "".join(tokens["text"][tokens["is_prompt"]])
    assert prompt == (ROOT / "traces" / "example.txt").read_text(encoding="utf-8")
    facts = {(name, verb): value for name, verb, value in re.findall(r"Note: (\w+) (\w+) (\d+)\.", prompt)}
    asked = re.findall(r"Question: what (\w+) (\w+)\? Answer: \2 \1", prompt)
    assert len(facts) >= 2
    assert {(name, verb) for verb, name in asked} == set(facts)
    verb, name = asked[-1]
    assert "".join(tokens["text"][~tokens["is_prompt"]]).startswith(f" {facts[name, verb]}.")


def test_the_trace_has_everything_that_a_policy_may_need(trace: Trace) -> None:
    assert trace.stored >= {"maps", "value_l1", "value_l2", "key_l2", "similarity", "queries", "vectors:keys"}
    assert 80 <= trace.sequences[0].prompt <= 100
    assert trace.sequences[0].length - trace.sequences[0].prompt == 16


def test_the_replay_is_of_this_trace(trace: Trace, committed: Replay) -> None:
    assert committed.info.trace.identity == trace.identity


def of_open(replay: Replay) -> list[int]:
    return [run.run for run in replay.info.runs if run.loop == "open"]


def test_decisions_are_the_same(committed: Replay, again: Replay) -> None:
    runs = of_open(committed)
    assert of_open(again) == runs and {"belady", "h2o"} <= {committed.info.runs[run].policy for run in runs}
    for run in runs:
        assert again.info.runs[run].decisions == committed.info.runs[run].decisions
        assert_frame_equal(again.residency(run=run), committed.residency(run=run))


def test_metrics_are_the_same(committed: Replay, again: Replay) -> None:
    for run in of_open(committed):
        assert_frame_equal(again.fidelity(run=run), committed.fidelity(run=run), rtol=0, atol=1e-6)
        made, kept = again.summary.runs[run], committed.summary.runs[run]
        assert (made.label, made.budget) == (kept.label, kept.budget)
        stated = pd.Series(values(kept), dtype=float)
        assert_series_equal(pd.Series(values(made), dtype=float), stated, rtol=0, atol=1e-6)


def test_perplexities_are_the_same(committed: Replay, again: Replay) -> None:
    """Up to what the matrix products of another machine change: a tie may tip, and what follows from it."""
    made, kept = (
        {(row.label, row.budget): math.log(row.mean("perplexity")) for row in each.summary.runs if row.loop == "closed"}
        for each in (again, committed)
    )
    assert made == pytest.approx(kept, abs=0.05)
    assert len(kept) > 40 and max(kept.values()) > 1


def readable(page: Path) -> tuple[Any, str]:
    """Return the data of a page with its numbers unpacked, and all the rest of it but the version and Plotly.

    Packed floats become ``(values, low, high)``, other packed numbers an array. So much else may differ between two
    machines: how zlib packs, and whose release of Plotly and kvscope this is.
    """

    def inflated(value: Any) -> Any:
        if isinstance(value, dict) and value.keys() >= {"dtype", "shape", "data"}:
            return (unpacked(value), value["low"], value["high"]) if "low" in value else unpacked(value)
        if isinstance(value, dict):
            return {name: inflated(each) for name, each in value.items()}
        return [inflated(each) for each in value] if isinstance(value, list) else value

    text = page.read_text(encoding="utf-8")
    start, end = text.index('id="data">') + len('id="data">'), text.index('</script>\n<script type="text/plain"')
    data = inflated(json.loads(text[start:end]))
    data.pop("generator")
    rest = re.sub(
        r'(id="plotly">)[^<]*|(script-src )[^;]*|(name="generator" content=")[^"]*', "", text[:start] + text[end:]
    )
    return data, rest


def assert_same(made: Any, kept: Any, where: str) -> None:
    """Compare what two pages say: text, integers and weights exactly, computed floats up to what sums may differ by.

    Metrics are sums of float32 weights in the order that the processor's vector unit and BLAS take. They differ in
    the seventh digit; a page states six digits, and packs an array in 65,534 steps from its lowest to its highest
    value. So two values may lie `COMPUTED` apart, and packed ones a step more, which rounding may tip.
    """
    if isinstance(kept, dict):
        assert isinstance(made, dict) and made.keys() == kept.keys(), where
        for name, value in kept.items():
            assert_same(made[name], value, f"{where}.{name}")
    elif isinstance(kept, list):
        assert isinstance(made, list) and len(made) == len(kept), where
        for index, value in enumerate(kept):
            assert_same(made[index], value, f"{where}[{index}]")
    elif isinstance(kept, tuple):
        (values, low, high), (kept_values, kept_low, kept_high) = made, kept
        assert (low, high) == pytest.approx((kept_low, kept_high), rel=COMPUTED, abs=COMPUTED), where
        step = (kept_high - kept_low) / 65_534
        np.testing.assert_allclose(values, kept_values, rtol=COMPUTED, atol=COMPUTED + 1.01 * step, err_msg=where)
    elif isinstance(kept, np.ndarray):  # counts, positions, and weights as the trace holds them
        assert made.dtype == kept.dtype
        np.testing.assert_array_equal(made, kept, err_msg=where)
    elif isinstance(kept, float) or isinstance(made, float):
        assert made == pytest.approx(kept, rel=COMPUTED, abs=COMPUTED), where
    else:
        assert made == kept, where


def test_the_report_is_that_of_the_example(trace: Trace, committed: Replay, tmp_path: Path) -> None:
    page = ROOT / "reports" / "example.html"
    assert page.stat().st_size < 3.6 * MEGABYTE
    traces = {trace.identity: trace}
    spans = spans_of([committed], traces, SPANS)
    made = report([committed], traces, tmp_path / "example.html", spans=spans)
    (data, rest), (kept_data, kept_rest) = readable(made), readable(page)
    assert len(rest) > 90_000
    assert_same(data, kept_data, "reports/example.html")
    panel = next(panel for panel in kept_data["panels"] if panel["name"] == "spans")
    shown = panel["data"]["parts"]["0.0"]["spans"]
    tokens = kept_data["parts"]["0.0"]["tokens"]
    texts = {span["name"]: "".join(tokens[span["start"] : span["stop"]]).replace("␣", " ").strip() for span in shown}
    assert texts == {name: words.removeprefix("text:") for name, words in (span.split("=", 1) for span in SPANS)}
    assert rest == kept_rest, "style or scripts are no longer those of reports/example.html"


@pytest.mark.parametrize(
    ("made", "kept"),
    [
        ({"a": 1}, {"a": 2}),
        ({"a": [0.5]}, {"a": [0.50001]}),
        ({"a": "h2o"}, {"a": "tova"}),
        ({"a": None}, {"a": 0.5}),
        ({"a": [1]}, {"a": [1, 2]}),
        ((np.array([0.0, 0.5]), 0.0, 1.0), (np.array([0.0, 0.50004]), 0.0, 1.0)),
        ((np.array([0.0, np.nan]), 0.0, 1.0), (np.array([0.0, 0.0]), 0.0, 1.0)),
        (np.array([3], np.uint8), np.array([4], np.uint8)),
    ],
)
def test_the_comparison_of_pages_sees_a_difference(made: Any, kept: Any) -> None:
    assert_same(kept, kept, "itself")
    with pytest.raises(AssertionError):
        assert_same(made, kept, "page")


def test_readme_and_documentation_show_pictures_of_the_report() -> None:
    first = re.search(r"\]\((reports/example-\w+\.png)\)", (ROOT / "README.md").read_text(encoding="utf-8")[:1000])
    assert first is not None, "README.md has a picture above the fold"
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(\.\./(reports/example-\w+\.png)\)", page)
    assert first[1] in named
    assert sorted(named) == sorted(f"reports/{file.name}" for file in (ROOT / "reports").glob("*.png"))
    assert len(named) == 3
    for name in named:
        assert (ROOT / name).stat().st_size < 0.25 * MEGABYTE


@pytest.mark.parametrize(("path", "most"), [("traces/example", 1.5), ("reports/example", 2.2)])
def test_examples_are_small_and_tell_nothing_of_a_machine(path: str, most: float) -> None:
    files = [file for file in (ROOT / path).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < most * MEGABYTE
    for file in [*files, ROOT / "reports" / "example.html"]:
        assert str(ROOT).encode() not in file.read_bytes(), f"{file} names a folder of this machine"
        if file.suffix == ".json":
            assert not re.search(r'"(host|pid)"|"/', file.read_text(encoding="utf-8")), f"{file} holds a path or a host"

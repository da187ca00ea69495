"""Prompts that differ in one number support no claim, and every command that shows one says so."""

import json
from pathlib import Path

import pytest

from kvscope.results.store import open_replay
from tests.cli.conftest import Run

TEMPLATE = "The committee met on day {} of the month, and the secretary wrote down what everyone said about the bridge."
UNLIKE = (
    "Snow fell on the harbour all night while two old sailors argued over cards.",
    "How does a plant turn light into sugar, and what becomes of the oxygen?",
    "My grandmother kept seven hens, a goat, and a blue bicycle without brakes.",
    "Prices rose again in spring; bakers blamed the mills, millers the weather.",
    "def area(width, height): return width * height  # in square metres, always",
    "Queen to e7 was a mistake that nobody in the audience dared to name aloud.",
)


@pytest.fixture
def record(run: Run):
    def go(name: str, prompts: list[str]) -> Run:
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
        traced = run("trace", "--model", "demo", f"{name}.jsonl", "--max-new-tokens", "8", "-o", name, "-q")
        assert traced.status == 0, traced.err
        done = run("replay", name, "-p", "h2o", "-p", "tova", "-b", "30%", "--perplexity", "-o", f"{name}-r", "-q")
        assert done.status == 0, done.err
        return run

    return go


def test_eight_prompts_of_one_template_count_as_one(record) -> None:
    run = record("copies", [TEMPLATE.format(day) for day in range(11, 19)])
    compared = json.loads(run("compare", "copies-r", "--json").out)
    assert compared["warnings"][0].startswith("8 sequences count as 1: the others are near-copies")
    for row in compared["rows"]:
        assert (row["sequences"], row["clusters"], row["low"], row["better"]) == (8, 1, None, "")
        assert row["p"] == 1
    summary = open_replay("reports/copies-r").summary
    assert summary.trace.near_copies == (0,) * 8
    assert {value.low for each in summary.runs for value in each.metrics.values()} == {None}
    assert "8 sequences count as 1" in " ".join(
        run("replay", "copies", "-p", "lru", "-b", "30%", "-o", "again").out.split()
    )
    table = run("compare", "copies-r")
    assert "in clusters" in table.out
    assert "8 sequences count as 1" in table.err
    assert run("report", "copies-r", "-q").status == 0
    (page,) = Path("reports").rglob("*.html")
    assert "8 sequences count as 1" in page.read_text()


def test_unlike_prompts_are_counted_as_before(record) -> None:
    run = record("unlike", list(UNLIKE))
    compared = json.loads(run("compare", "unlike-r", "--json").out)
    assert not [warning for warning in compared["warnings"] if "near-copies" in warning]
    assert {row["clusters"] for row in compared["rows"]} == {6}
    summary = Path("reports/unlike-r/summary.json").read_text()
    assert "near_copies" not in summary
    assert "near_copies" not in Path("reports/unlike-r/run.json").read_text()
    assert json.loads(summary)["runs"][0]["metrics"]["retained_mass"]["low"] is not None

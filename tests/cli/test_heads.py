"""``kvscope heads`` writes the scores of heads, and refuses what it cannot write."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from kvscope.analysis.head_scores import as_json, as_table, head_scores
from kvscope.trace.reader import open_trace
from tests.cli.conftest import Run

EXAMPLE = Path(__file__).parents[2] / "traces" / "example"
SPAN = "fact=10:20"


def test_scores_are_written_and_listed(run: Run) -> None:
    done = run("heads", EXAMPLE, "--span", SPAN, "-o", "h.tsv", "--json")
    found, expected = json.loads(done.out), head_scores([open_trace(EXAMPLE)], [SPAN])
    scores = [one["score"] for one in found["heads"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == expected.size
    assert all(one["score"] == expected[one["layer"], one["head"]] for one in found["heads"])
    assert Path("h.tsv").read_text() == as_table(expected)
    shown = run("heads", EXAMPLE, "--span", SPAN, "-o", "h.json")
    assert shown.status == 0 and Path("h.json").read_text() == as_json(expected)
    best = found["heads"][0]
    assert f"{best['layer']}.{best['head']} ({best['score']:.2f})" in shown.out


def test_what_cannot_be_written_is_refused_first(run: Run) -> None:
    Path("h.tsv").write_text("mine")
    what, _ = run("heads", "nowhere", "-o", "h.tsv").two_lines()
    assert "exists already" in what and Path("h.tsv").read_text() == "mine"
    what, _ = run("heads", EXAMPLE, "--span", SPAN, "-o", "h.txt").two_lines()
    assert what == "h.txt is neither .tsv nor .json"
    what, todo = run("heads", EXAMPLE).two_lines()
    assert "has no span needle" in what and "--span fact=text:WORDS" in todo
    assert not Path("heads.tsv").exists()


def test_the_heads_of_one_needle_retrieve_another(run: Run) -> None:
    """Four of 32 heads of the bundled model copy a fact; another needle has most of its mass there."""
    found = []
    for seed in ("1", "2"):
        run(
            "tasks",
            "make",
            "needle:wording=notes",
            "--length",
            "120",
            "--number",
            "1",
            "--seed",
            seed,
            "-o",
            f"{seed}.jsonl",
        )
        run("trace", "--model", "demo", f"{seed}.jsonl", "--max-new-tokens", "6", "-o", seed)
        assert run("heads", f"traces/{seed}", "-o", f"{seed}.tsv").status == 0
        found.append(np.loadtxt(f"{seed}.tsv"))
    one, other = (table.reshape(-1) for table in found)
    best = one.argsort()[-4:]
    assert other[best].sum() > 0.5 * other.sum()

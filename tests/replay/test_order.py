"""The order of policies and budgets on the command line changes nothing but the order of the runs."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from kvscope.results.store import open_replay
from tests.cli.conftest import Run, run  # noqa: F401  a fixture

EXAMPLE = Path(__file__).resolve().parents[2] / "traces" / "example"
POLICIES = ["h2o", "tova", "streaming-llm", "a2sf:alpha=0.5", "belady", "snapkv"]
BUDGETS = ["20%", "40%", "32"]


def test_permuting_policies_and_budgets_permutes_the_runs(run: Run) -> None:  # noqa: F811
    shutil.copytree(EXAMPLE, "traces/e")
    draw, found = random.Random(7), []
    for name in "ab":
        policies, budgets = draw.sample(POLICIES, len(POLICIES)), draw.sample(BUDGETS, len(BUDGETS))
        given = [part for policy in policies for part in ("-p", policy)]
        done = run("replay", "e", *given, "-b", ",".join(budgets), "-o", name, "-q")
        assert done.status == 0, done.err
        replay = open_replay(Path("reports") / name)
        runs = zip(replay.info.runs, replay.summary.runs, strict=True)
        found.append({(one.label, one.budget): (one.decisions, summed.metrics) for one, summed in runs})
    assert list(found[0]) != list(found[1]), "the orders differ"
    assert found[0] == found[1]


@pytest.mark.parametrize("bad", ["nosuch", "h2o:recent=x", "a2sf:alpha=7"])
def test_permuting_policies_permutes_no_refusal(run: Run, bad: str) -> None:  # noqa: F811
    shutil.copytree(EXAMPLE, "traces/e")
    said = {run("replay", "e", "-p", a, "-p", b, "-b", "20%", "-q").err for a, b in ((bad, "tova"), ("tova", bad))}
    assert len(said) == 1 and "error: " in said.pop()

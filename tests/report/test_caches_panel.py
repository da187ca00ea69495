"""Quantised caches in the report: the committed example shows the curve over bytes and the table of its summary."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import kvscope
from kvscope.core.options import ClosedLoopOptions, OutputOptions, PlanOptions, ReplayOptions
from kvscope.replay.compile import compile_replay
from kvscope.report.page import page_data
from kvscope.report.panels.budget_curve import budget_curve
from kvscope.report.panels.caches import _policy, caches
from kvscope.report.source import ReportInput
from kvscope.results.store import Replay, open_replay

ROOT = Path(__file__).parents[2]
FORMATS = ["16bit", "int4:kivi(group=16,residual=16)", "int2:kivi(group=16,residual=16)"]


@pytest.fixture(scope="module")
def quantised() -> Replay:
    return open_replay(ROOT / "reports" / "example-quantised")


def test_the_example_is_small_and_names_no_folder_of_a_machine() -> None:
    files = list((ROOT / "reports" / "example-quantised").iterdir())
    assert sum(file.stat().st_size for file in files) < 1_000_000
    assert not any(str(ROOT).encode() in file.read_bytes() for file in files)
    info = json.loads((ROOT / "reports" / "example-quantised" / "run.json").read_text(encoding="utf-8"))
    assert info["trace"]["path"] == "traces/quantised"


def test_the_table_has_bytes_perplexity_and_answers_of_every_cache(quantised: Replay) -> None:
    data = caches(ReportInput((quantised,)))
    assert data is not None
    assert (data["caches"], data["metrics"]) == (FORMATS, ["perplexity_ratio", "answer_score"])
    assert [(row["policy"], row["budget"]) for row in data["rows"]] == [
        ("full", None),
        *((policy, budget) for policy in ("h2o", "snapkv", "streaming-llm") for budget in ("20%", "50%")),
    ]
    runs = {f"0.{run.run}": run for run in quantised.summary.runs}
    for row in data["rows"]:
        sizes = [cell["bytes"] for cell in row["cells"]]
        assert sizes == sorted(set(sizes), reverse=True), "fewer bits, fewer bytes"
        for name, cell in zip(FORMATS, row["cells"], strict=True):
            run = runs[cell["run"]]
            assert (run.policy, run.budget, run.cache or "16bit", run.loop) == (
                *(row["policy"], row["budget"], name),
                "closed",
            )
            assert cell["bytes"] == pytest.approx((run.mean("cache_bytes") or 0) * 4 * 4, rel=1e-5)
            assert cell["values"] == pytest.approx(
                {metric: run.mean(metric) for metric in ("perplexity_ratio", "answer_score")}, rel=1e-5
            )


def test_the_curve_is_over_bytes_with_a_line_of_the_full_cache(quantised: Replay) -> None:
    lines = {line["name"]: line for line in budget_curve(ReportInput((quantised,)))["lines"]}
    assert {"h2o", "h2o + int4:kivi"} <= {name.split(" · ")[0].split("(")[0] for name in lines}
    (full,) = [line for line in lines.values() if line["sizes"] and line["name"].startswith("full")]
    assert len(full["runs"]) == 3
    figure = kvscope.plot(quantised, "budget_curve", metric="perplexity_ratio")
    assert figure.layout.xaxis.title.text.startswith("bytes of a head's cache")
    assert {panel["name"] for panel in page_data(ReportInput((quantised,)))["panels"]} >= {"caches", "budget-curve"}


def test_one_cache_needs_no_table(replay: Replay) -> None:
    assert caches(ReportInput((replay,))) is None


def test_runs_that_merge_have_a_row_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("Note: Clara holds 583. It was late, and the ship had not come. Clara holds")
    trace = kvscope.trace("demo", [tmp_path / "p.txt"], output=tmp_path / "t", max_new_tokens=4)

    def replayed(name: str, policies: list[str], **plan: tuple[str, ...]) -> Replay:
        options = ReplayOptions(plan=PlanOptions(**plan), closed=ClosedLoopOptions())
        return compile_replay(trace, policies, "50%", options).execute(OutputOptions(tmp_path / name))

    policy = "h2o:recent=3"
    coded = replayed("coded", [policy, "full"], caches=tuple(FORMATS[:2]))
    merged = replayed("merged", [policy], caches=("16bit",), merges=("none", "cam", "d2o(beta=0.3)"))
    data = caches(ReportInput((coded, merged), {trace.identity: trace}))
    assert data is not None and data["caches"] == FORMATS[:2]
    label = next(run.label for run in merged.summary.runs if run.merge is None)
    rows = {row["policy"]: [cell is not None for cell in row["cells"]] for row in data["rows"]}
    assert rows == {
        "full": [True, True],
        label: [True, True],
        f"{label} + cam": [True, False],
        f"{label} + d2o(beta=0.3)": [True, False],
    }


def test_the_policy_of_a_label_with_a_cache_and_a_rule(quantised: Replay) -> None:
    (run,) = [run for run in ReportInput((quantised,)).ranking if run.label == f"h2o + {FORMATS[1]}"][:1]
    both = replace(run.info, label=f"h2o + {FORMATS[1]} + cam", merge="cam(tokens=16,chance=mean,seed=0)")
    assert _policy(run) == "h2o"
    assert _policy(replace(run, info=both)) == "h2o + cam"
    odd = replace(run.info, label=f"a + b + {FORMATS[1]}")
    assert _policy(replace(run, info=odd)) == "a + b"

"""What the panels above the bar say, as plain data: overview, curves, sweep, outcome, provenance."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvscope
from kvscope.core.records import Certificate, TextRef
from kvscope.core.summary_records import BoundShares, HeadPlace, LoopGap, MetricSummary, StepPlace, Tails
from kvscope.report.headline import headline, shown_groups
from kvscope.report.limits import Limits
from kvscope.report.page import page_data
from kvscope.report.panels.budget_curve import budget_curve, curve_lines
from kvscope.report.panels.depth import depth
from kvscope.report.panels.outcome import outcome
from kvscope.report.panels.overview import overview
from kvscope.report.panels.provenance import BOUNDS, CLOSED_LOOP, GENERATED, MIXED, OPEN_LOOP, provenance
from kvscope.report.panels.sweep import sweep
from kvscope.report.runs import BESIDE, RunView
from kvscope.report.source import ReportInput
from kvscope.results.ranking import KINDS
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace, open_trace
from tests.report.make import MASS, METRICS, make_replay, make_trace
from tests.results.make import with_summary


def named(source: ReportInput, id: str) -> tuple[str, str | None]:
    run = next(run for run in source.runs if run.id == id)
    return run.label, run.budget


def run_of(source: ReportInput, label: str, budget: str | None, loop: str = "open") -> RunView:
    return next(run for run in source.runs if (run.label, run.budget, run.protocol[1]) == (label, budget, loop))


def marks(source: ReportInput) -> dict[tuple[str, str | None], dict[str, str]]:
    """Return the marks of every run in the metrics of the fixture."""
    rows = overview(source)["rows"]
    return {named(source, row["run"]): {k: v for k, v in row["marks"].items() if k in METRICS} for row in rows}


def test_run_as_the_page_knows_it(source: ReportInput) -> None:
    run = next(run for run in page_data(source)["runs"] if run["name"] == "tova · 2")
    run["values"] = {name: value for name, value in run["values"].items() if name in METRICS}
    assert run == {
        "id": "0.3",
        "name": "tova · 2",
        "title": "tova",
        "label": "tova",
        "policy": "tova",
        "budget": "2",
        "keys": 2.0,
        "full": 5.0,
        "kind": "every step",
        "marks": [],
        "loop": "open",
        "prefill": "full",
        "replay": "small",
        "parts": ["0.0"],
        "values": {
            "retained_mass": [0.625, None, None, 24],
            "ideal_mass": [0.92, None, None, 24],
            "output_error": [0.375, None, None, 24],
            "held_keys": [2.0, None, None, 24],
            "read_keys": [3.0, None, None, 24],
        },
    }


def test_rows_are_in_the_order_of_budget_then_fidelity_and_no_budget_comes_last(source: ReportInput) -> None:
    assert [named(source, row["run"]) for row in overview(source)["rows"]] == [
        ("tova", "2"),
        ("h2o", "2"),
        ("window", "2"),
        ("tova", "4"),
        ("h2o", "4"),
        ("window", "4"),
        ("full", None),
    ]


def test_best_and_last_are_marked_within_a_budget(source: ReportInput) -> None:
    found = marks(source)
    both = {
        "best": {"retained_mass": "best", "output_error": "best"},
        "last": {"retained_mass": "last", "output_error": "last"},
    }
    assert found["tova", "4"] == both["best"]
    assert found["window", "2"] == both["last"]
    assert found["h2o", "2"] == found["full", None] == {}


def test_every_run_has_its_kind(rich: ReportInput) -> None:
    kinds = {run.info.policy: run.kind for run in rich.runs}
    assert kinds == {
        "full": "no eviction",
        "h2o": "every step",
        "tova": "every step",
        "window": "every step",
        "a2sf": "every step",
        "snapkv": "prompt only",
        "quest": "reads a part",
        "belady": "bound",
    }
    assert set(kinds.values()) <= set(KINDS)


@pytest.mark.parametrize(("policy", "kind"), [("r-kv", "every N steps"), ("attention-gate", "own size")])
def test_further_kinds(trace: Trace, tmp_path: Path, policy: str, kind: str) -> None:
    source = ReportInput((make_replay(tmp_path / "replay", trace, mass={policy: {"2": 0.5}}),))
    assert source.runs[0].kind == kind
    assert source.runs[0].marks == (["every 128 steps"] if policy == "r-kv" else [])


def test_runs_of_different_kinds_are_not_ranked_among_each_other(rich: ReportInput) -> None:
    found = marks(replace(rich, replays=rich.replays[:1]))
    assert found["snapkv", "4"] == found["quest", "4"] == {}, "better than every policy, and of another kind"
    assert found["a2sf:alpha=0.9", "4"]["retained_mass"] == "best"
    assert found["belady", "4"] == {}, "a bound is no winner"


def test_the_best_table_names_a_winner_for_each_kind_with_its_cost(rich: ReportInput) -> None:
    source = replace(rich, replays=rich.replays[:1])
    lines = overview(source)["best"]
    assert [(named(source, line["run"])[1], run_of(source, *named(source, line["run"])).kind) for line in lines] == [
        (budget, kind) for budget in ("4", "8") for kind in ("every step", "prompt only", "reads a part")
    ]
    first = lines[0]
    winners = first["best"]["retained_mass"]
    assert (first["of"], winners["value"]) == (6, 0.9)
    assert [named(source, id) for id in winners["runs"]] == [("a2sf:alpha=0.9", "4")]
    assert (first["held"], first["read"], first["ideal"]) == ([4.0, 4.0], [5.0, 5.0], 0.94)
    assert first["full"] == (10 + 1 + 24) / 2, "mean of 11 to 24 keys"
    assert lines[1]["ideal"] is None, "a cache that grows has another ideal"


def test_the_closed_loop_stands_for_both_in_the_best_table(rich: ReportInput) -> None:
    data = overview(rich)
    assert {run_of(rich, *named(rich, line["run"]), loop="closed").id for line in data["best"]} == {
        line["run"] for line in data["best"]
    }
    assert all(line["best"]["perplexity_ratio"]["value"] for line in data["best"])
    assert "The upper table shows the closed loop where it was replayed, the lower table both loops." in data["notes"]


def sentence(pieces: Any) -> str:
    return "".join(piece["text"] for piece in pieces)


def test_the_page_begins_with_the_best_by_every_metric(
    rich: ReportInput, source: ReportInput, trace: Trace, tmp_path: Path
) -> None:
    """A reader who sees nothing else sees which policy is best at which budget, by what, and what that costs."""
    (pieces,) = headline(source)
    assert sentence(pieces) == (
        "At budget 2, 2 of 5 keys held: of 3 policies (kind: every step), tova has the lowest output error (0.375) and "
        "the highest retained mass (0.625)."
    )
    (said,) = page_data(rich)["headline"]
    assert sentence(said).startswith(
        "At budget 4, 4 of 18 keys held: of 6 policies (kind: every step), a2sf:alpha=0.9 "
    )
    assert (
        f"has the highest share of right answers (100%), the lowest perplexity ({math.exp(0.1):.3f}x full cache), the "
        in (sentence(said))
    )
    assert [piece["run"] for piece in said if "run" in piece] == [run_of(rich, "a2sf:alpha=0.9", "4", "closed").id]
    alone = make_replay(tmp_path / "alone", trace, mass={"full": {None: None}})
    assert headline(ReportInput((alone,))) == []


def test_a_run_without_competitors_is_neither_the_best_nor_the_worst(trace: Trace, tmp_path: Path) -> None:
    alone = ReportInput((make_replay(tmp_path / "alone", trace, mass={"h2o": {"2": 0.5}}),))
    (pieces,) = headline(alone)
    assert sentence(pieces) == "At budget 2, 2 of 5 keys held: h2o has output error 0.500 and retained mass 0.500."


def test_the_run_shown_first_has_competitors_if_any_has(trace: Trace, tmp_path: Path) -> None:
    replay = make_replay(tmp_path / "r", trace, mass={"h2o": {"2": 0.9}, "tova": {"2": 0.6}, "window": {"2": 0.4}})
    assert ReportInput((replay,)).first.label == "h2o"
    info = replay.info
    coded = [replace(info.runs[0], cache="int4:kivi"), *info.runs[1:]]
    other = Replay(replay.path, replace(info, runs=coded))
    summary = replay.summary
    other.__dict__["summary"] = replace(summary, runs=[replace(summary.runs[0], cache="int4:kivi"), *summary.runs[1:]])
    source = ReportInput((other,))
    assert source.first.label == "tova"
    assert sentence(headline(source)[0]).startswith("At budget 2, 2 of 5 keys held: of 2 policies")


def test_sentences_are_in_the_order_of_the_replays(tmp_path: Path) -> None:
    traces = [make_trace(tmp_path / word, texts=[word, " king", "\n", " said", " 7", "!"]) for word in ("one", "two")]
    mass = {"h2o": {"2": 0.9, "4": 0.95}, "tova": {"2": 0.6, "4": 0.7}}
    replays = [make_replay(tmp_path / f"of-{trace.name}", trace, mass=mass) for trace in traces]
    for order in (replays, replays[::-1]):
        names, source = [replay.path.name for replay in order], ReportInput(tuple(order))
        assert [sentence(pieces).partition(":")[0] for pieces in headline(source)] == names
        groups = [(group[0].source, group[0].budget) for group in shown_groups(source)]
        assert groups == [(name, budget) for name in names for budget in ("2", "4")]


def test_numbers_of_the_first_sentence_are_explained(source: ReportInput) -> None:
    (pieces,) = headline(source)
    how = {piece["text"]: piece["how"] for piece in pieces if "how" in piece}
    assert how["2 of 5 keys held"] == (
        "The budget is 2 keys in each key/value head. 2 keys are held after a step, mean over the steps after the "
        "prompt; a full cache holds 5 there. The text has 6 tokens, 3 of them prompt."
    )
    assert how["the highest retained mass (0.625)"] == (
        "Share that is visible. Higher is better. Second: h2o with 0.500."
    )


def test_the_first_sentence_names_the_share_of_the_prompt(source: ReportInput) -> None:
    (replay,) = source.replays
    runs = [replace(run, budget="60%") if run.budget == "2" else run for run in replay.summary.runs]
    shares = Replay(replay.path, replay.info)
    shares.__dict__["summary"] = replace(replay.summary, runs=runs)
    (pieces,) = headline(replace(source, replays=(shares,)))
    (how,) = [piece["how"] for piece in pieces if "keys held" in piece["text"]]
    assert how.startswith("The budget is 2 keys in each key/value head, 60% of the prompt of 3 tokens. 2 keys are held")


def test_the_first_sentence_says_where_metrics_disagree(trace: Trace, tmp_path: Path) -> None:
    replay = make_replay(tmp_path / "r", trace, mass={"h2o": {"2": 0.5}, "tova": {"2": 0.6}, "window": {"2": 0.4}})
    assert "disagree" not in sentence(headline(ReportInput((replay,)))[0])
    assert [line["agree"] for line in overview(ReportInput((replay,)))["best"]] == [True]
    metrics = replay.summary.runs[0].metrics
    other = with_summary(
        replay, 0, metrics={**metrics, "output_error": MetricSummary(0.1, low=0.05, high=0.45, count=6)}
    )
    (pieces,) = headline(ReportInput((other,)))
    assert sentence(pieces).endswith(
        "h2o has the lowest output error (0.100); tova has the highest retained mass (0.600). They disagree."
    )
    how = {piece["text"]: piece["how"] for piece in pieces if "how" in piece}
    assert how["They disagree."].startswith("No policy is the best by all of these metrics.")
    assert (
        "95 % interval 0.050 to 0.450. 1 other policy has its mean inside it. Second: tova"
        in (how["the lowest output error (0.100)"])
    )
    assert [line["agree"] for line in overview(ReportInput((other,)))["best"]] == [False]


def test_runs_of_different_prefill_are_not_compared(trace: Trace, tmp_path: Path) -> None:
    one = {"h2o": {"2": 0.5}}
    replays = [make_replay(tmp_path / prefill, trace, mass=one, prefill=prefill) for prefill in ("full", "stream")]
    data = overview(ReportInput(tuple(replays)))
    assert all(row["marks"] == {} for row in data["rows"])
    assert [line["of"] for line in data["best"]] == [1, 1]


def test_overview_says_why_there_is_no_interval_and_what_is_left_out(source: ReportInput) -> None:
    assert overview(source)["notes"] == ["No intervals are shown: they need five or more sequences."]
    notes = overview(replace(source, limits=Limits(rows=5)))["notes"]
    assert notes[0] == "The table shows 5 of 7 rows; summary.json has the others."


def test_intervals_come_with_five_sequences(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "trace", sequences=5)
    source = ReportInput((make_replay(tmp_path / "replay", trace, mass={"h2o": {"2": 0.5}}),))
    assert page_data(source)["runs"][0]["values"]["retained_mass"][:3] == pytest.approx([0.5] * 3)
    assert overview(source)["notes"] == []


def test_policies_inside_the_interval_of_the_best_are_counted(trace: Trace, tmp_path: Path) -> None:
    mass: dict[str, dict[str | None, Any]] = {"h2o": {"2": 0.5}, "tova": {"2": 0.49}, "window": {"2": 0.3}}
    replay = make_replay(tmp_path / "replay", trace, mass=mass)
    best = overview(ReportInput((replay,)))["best"][0]["best"]["retained_mass"]
    assert best["near"] == 0, "one sequence has no interval"
    metrics = replay.summary.runs[0].metrics
    between = replace(metrics["retained_mass"], low=0.48, high=0.52)
    replay = with_summary(replay, 0, metrics={**metrics, "retained_mass": between})
    assert overview(ReportInput((replay,)))["best"][0]["best"]["retained_mass"]["near"] == 1


def test_shares_of_the_bounds_are_metrics(rich: ReportInput) -> None:
    run = run_of(rich, "h2o", "4")
    assert (run.mean("share_of_belady"), run.mean("belady_of_ideal")) == (0.75, 0.5)
    declared = {metric.name: metric for metric in rich.metric_facts()}
    assert declared["share_of_belady"].direction == "higher"
    assert "share_of_belady" in overview(rich)["usual"]


def test_metrics_stand_in_reading_order_with_cost_last(source: ReportInput) -> None:
    names = [metric.name for metric in source.metric_facts() if metric.name in METRICS]
    assert names == ["retained_mass", "ideal_mass", "output_error", "read_keys", "held_keys"]


def test_first_run_of_the_page_is_the_best_that_decides_at_every_step(rich: ReportInput, source: ReportInput) -> None:
    assert (rich.first.label, rich.first.budget) == ("a2sf:alpha=0.9", "4")
    assert (source.first.label, source.first.budget) == ("tova", "2")


def test_curve_has_a_point_per_budget_and_a_line_per_policy(source: ReportInput) -> None:
    data = budget_curve(source)
    assert [line["name"] for line in data["lines"]] == ["h2o", "tova", "window"]
    assert [named(source, id) for id in data["lines"][1]["runs"]] == [("tova", "2"), ("tova", "4")]
    assert data["notes"] == ["No line, because they have no budget: full."]
    (reference,) = data["references"]
    assert (reference["metric"], reference["values"]) == ("retained_mass", "ideal_mass")
    assert [named(source, id)[1] for id in reference["runs"]] == ["2", "4"]


def test_a_handful_of_lines_is_shown_at_first_with_bounds_and_baselines(rich: ReportInput) -> None:
    source = replace(rich, replays=rich.replays[:1])
    data = budget_curve(source)
    usual = [data["lines"][place]["name"] for place in data["usual"]]
    assert usual == ["h2o", "tova", "window", "snapkv", "quest", "belady", "a2sf:alpha=0.9"]
    assert len(usual) < len(data["lines"])


def test_curve_of_a_reader_that_holds_every_key_is_apart(trace: Trace, tmp_path: Path) -> None:
    """Otherwise a point at all keys presses the policies that evict into the left of the plot."""
    replay = make_replay(tmp_path / "r", trace, mass={"h2o": {"2": 0.5, "4": 0.6}, "quest": {"2": 0.5, "4": 0.6}})
    assert {line["name"]: line["all"] for line in budget_curve(ReportInput((replay,)))["lines"]} == {
        "h2o": False,
        "quest": False,  # in this fixture it holds as few keys as h2o
    }
    for number in (2, 3):
        metrics = replay.summary.runs[number].metrics
        replay = with_summary(replay, number, metrics={**metrics, "held_keys": replace(metrics["held_keys"], mean=4.9)})
    assert {line["name"]: line["all"] for line in budget_curve(ReportInput((replay,)))["lines"]} == {
        "h2o": False,
        "quest": True,
    }
    assert {run["full"] for run in page_data(ReportInput((replay,)))["runs"]} == {5.0}


def test_curve_of_one_budget_says_how_to_get_a_line(trace: Trace, tmp_path: Path) -> None:
    data = budget_curve(ReportInput((make_replay(tmp_path / "one", trace, mass={"h2o": {"2": 0.5}}),)))
    assert data["notes"] == ["Only one budget was replayed. Lines need two or more: --budget 10%,20%,40%."]


def test_sweep_finds_the_parameter_that_alone_differs(rich: ReportInput, source: ReportInput) -> None:
    assert sweep(source) is None
    data = sweep(rich)
    assert data is not None
    (found,) = data["sweeps"]
    assert (found["policy"], found["parameter"]) == ("a2sf", "alpha")
    assert [line["values"] for line in found["lines"]] == [[0.1, 0.5, 0.9]] * 4, "two budgets, two loops"
    assert [named(rich, id) for id in found["lines"][0]["runs"]] == [(f"a2sf:alpha={a}", "4") for a in (0.1, 0.5, 0.9)]


def test_what_was_tuned_is_shown_layer_by_layer(trace: Trace, tmp_path: Path) -> None:
    settings = [{"alpha": 0.1, "recent": 2}, {"alpha": 0.5, "recent": 2}, {"alpha": 0.9, "recent": 2}]
    tuned = {"tuned": "tuned.toml", "settings": settings, "layers": [0, 1], "choice": [[2, 0], [1, 1]]}
    replay = make_replay(tmp_path / "r", trace, mass={"tuned": {"2": 0.5, "4": 0.6}}, params={"tuned": tuned})
    data = sweep(ReportInput((replay,)))
    assert data is not None and data["sweeps"] == []
    # one budget speaks for all, and what is the same everywhere says nothing
    assert data["tuned"] == [{"run": "0.0", "parameter": "alpha", "layers": [0, 1], "values": [[0.9, 0.1], [0.5, 0.5]]}]


def test_outcome_ranks_the_open_metric_against_the_closed_loop(rich: ReportInput, source: ReportInput) -> None:
    assert "outcome" not in source.offers
    data = outcome(rich)
    assert data is not None
    (group,) = data["groups"]
    place = group["runs"].index(run_of(rich, "tova", "4", "closed").id)
    assert group["values"]["retained_mass"][place] == 0.625
    # the loss was made to fall as the mass rises
    assert group["agreement"]["retained_mass"]["rank"] == pytest.approx(-1.0)
    assert group["agreement"]["output_error"]["rank"] == pytest.approx(1.0)
    assert group["agreement"]["share_of_belady"]["rank"] is None, "the same for all: no order"
    found = group["agreement"]["retained_mass"]
    assert (found["within"], found["budgets"], found["runs"]) == (pytest.approx(-1.0), 2, 16)
    keys = group["agreement"]["held_keys"]
    assert keys["rank"] < -0.3, "more keys, less loss"
    assert keys["within"] is None, "and nothing is known of who is better with as many keys"
    assert data["notes"] == []


def test_outcome_without_an_open_loop_says_whose_metric_it_is(rich: ReportInput) -> None:
    data = outcome(replace(rich, replays=rich.replays[1:]))
    assert data is not None
    assert data["notes"][0].startswith("17 of 17 runs have no open loop")


def test_without_a_closed_loop_there_is_no_word_of_it(source: ReportInput) -> None:
    assert not {"outcome", "sweep"} & {panel["name"] for panel in page_data(source)["panels"]}


def test_absent_trace_is_said_and_the_rest_still_shows(source: ReportInput) -> None:
    without = replace(source, traces={})
    page = page_data(without)
    assert page["notes"] == [
        "Token texts and attention rows are missing: the trace of small was not found.",
        "Not shown without a trace: Text, Regrets, Attention rows, Value norms, Query similarity. "
        "Make the report where the trace is stored.",
    ]
    assert page["parts"]["0.0"]["tokens"] is None
    assert {"residency", "agreement", "head-map"} <= {panel["name"] for panel in page["panels"]}
    assert [each["kind"] for each in provenance(without)["sources"]] == ["replay"]
    assert "was not found" in provenance(without)["notes"][0]


def test_a_replay_of_plain_text_misses_no_trace(replay: Replay) -> None:
    text = replace(replay.info.trace, kind="text", texts=(TextRef("book.txt", "d" * 64),))
    source = ReportInput((Replay(replay.path, replace(replay.info, trace=text)),))
    assert (
        page_data(source)["notes"][0] == "small is a replay of plain text without a trace, so there is no token text."
    )
    data = provenance(source)
    assert data["notes"] == []
    assert data["sources"][0]["prompts"] == [{"file": "book.txt", "sha256": "d" * 64}]


def test_provenance_names_model_prompt_versions_and_command(source: ReportInput) -> None:
    data = provenance(source)
    replay, trace = data["sources"]
    assert dict(replay["facts"])["command"] == "kvscope replay --policy h2o"
    assert dict(replay["facts"])["versions"] == "kvscope 0.1.0, numpy 2"
    facts = dict(trace["facts"])
    assert (facts["model"], facts["revision"], facts["seed"], facts["recorded layers"]) == ("tiny", "abc", "7", "all 2")
    assert trace["prompts"] == [{"file": "prompt.txt", "sha256": "c" * 64}]
    assert data["approximate"][:2] == [OPEN_LOOP, GENERATED]


def test_provenance_says_what_the_kinds_and_loops_leave_out(rich: ReportInput) -> None:
    assert {OPEN_LOOP, CLOSED_LOOP, MIXED, BOUNDS} <= set(provenance(rich)["approximate"])


def test_paths_of_the_machine_stay_out_of_the_page(source: ReportInput, tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "trace", prompt_file="/home/someone/prompts/one.txt")
    replay = make_replay(tmp_path / "replay", trace, mass={"h2o": {"2": 0.5}})
    data = provenance(ReportInput((replay,), {trace.identity: trace}))
    assert data["sources"][1]["prompts"][0]["file"] == "one.txt"
    assert str(source.replays[0].path.parent) not in str(page_data(source))


def test_replays_of_one_name_are_told_apart(trace: Trace, tmp_path: Path) -> None:
    one: dict[str, dict[str | None, Any]] = {"h2o": {"2": 0.5, "4": 0.6}}
    replays = tuple(make_replay(tmp_path / folder / "same", trace, mass=one) for folder in ("a", "b"))
    data = ReportInput(replays)
    assert data.names == ("same (1)", "same (2)")
    assert [line["name"] for line in budget_curve(data)["lines"]] == ["h2o · same (1)", "h2o · same (2)"]
    assert len({run.id for run in data.runs}) == 4
    assert list(data.parts) == ["0.0"], "one trace, one text"


def test_loops_of_one_policy_are_told_apart(rich: ReportInput) -> None:
    names = [run["name"] for run in page_data(rich)["runs"]]
    assert len(names) == len(set(names))
    assert "h2o · closed loop · closed · 4" in names


def test_mass_table_of_the_fixture_is_what_the_summary_reads(source: ReportInput) -> None:
    expected = {(policy, budget): value for policy, values in MASS.items() for budget, value in values.items()}
    found = {(run.label, run.budget): run.mean("retained_mass") for run in source.runs}
    assert found == pytest.approx(expected)


def test_what_a_summary_says_beside_its_metrics_is_shown_with_them(replay: Replay) -> None:
    summary = replace(
        replay.summary.runs[1],
        metrics={"retained_mass": MetricSummary(0.5)},
        bounds=BoundShares(0.9, None),
        gap=LoopGap(0.8, {}, None),
        tails={"retained_mass": Tails(0.25, 0.05, StepPlace(0.05, 0, 0, 0, 0), 0.1, HeadPlace(0, 0))},
    )
    run = RunView.of("0.0", replay, "small", summary)
    assert {name: run.mean(name) for name in run.metrics} == {
        "retained_mass": 0.5,
        "share_of_belady": 0.9,
        "held_overlap": 0.8,
        "share_below_half": 0.25,
        "worst_head": 0.1,
        "worst_step": 0.05,
    }
    assert set(run.metrics) - {"retained_mass"} <= set(BESIDE), "each is declared"


def test_a_bound_that_is_not_exact_says_so(replay: Replay) -> None:
    info = replace(replay.summary.runs[1], certificate=Certificate(False, 0.012))
    assert RunView.of("0.0", replay, "small", info).marks == ["at most 0.012 of mass from the optimum"]


def test_keys_by_depth_are_shown_for_what_shares_them_out_itself(source: ReportInput, gated: ReportInput) -> None:
    assert depth(source) is None, "every layer of these holds the same"
    data = depth(gated)
    assert data is not None and data["layers"] == [0, 1]
    held = {"2": 2 / gated.runs[0].full_keys, "4": 4 / gated.runs[0].full_keys}
    assert {named(gated, line["run"]): line["mean"] for line in data["lines"]} == {
        ("attention-gate", "2"): [round(held["2"], 4)] * 2,
        ("h2o", "2"): [round(held["2"], 4)] * 2,  # of its two budgets the nearer
        ("tova", "4"): [round(held["4"], 4)] * 2,
    }


def test_keys_by_depth_tell_layers_and_heads_apart(trace: Trace, tmp_path: Path) -> None:
    replay = make_replay(tmp_path / "replay", trace, mass={"attention-gate": {"2": 0.5}})
    source = ReportInput((replay,))
    source.means(replay).by_head["held_keys"][0] = np.array([[1.0, 3, 1, 3], [2, 2, 2, 2]])
    data = depth(source)
    assert data is not None
    found = [data["lines"][0][name] for name in ("mean", "low", "high")]
    assert np.allclose(found, np.array([[2, 2], [1, 2], [3, 2]]) / source.runs[0].full_keys, atol=1e-4)


def test_caches_of_fewer_bits_are_a_line_over_bytes(tmp_path: Path) -> None:
    """`full` has no budget: its runs with other caches are one line, which only the axis of bytes can draw."""
    example = open_trace(Path(__file__).parents[2] / "traces" / "example")
    caches = "16bit,int4(group=8,residual=8),int2(group=8,residual=8)"
    made = kvscope.replay(example, ["full", "h2o"], "20%,40%", cache=caches, output=tmp_path / "r")
    lines = {line.name: line for line in curve_lines(ReportInput((made,), {example.identity: example}))}
    sizes = lines.pop("full, caches of fewer bits")
    assert sizes.sizes and [run.info.cache for run in sizes.runs] == [
        "int2:kivi(group=8,residual=8)",
        "int4:kivi(group=8,residual=8)",
        None,
    ]
    assert [len(line.runs) for line in lines.values()] == [2, 2, 2] and not any(line.sizes for line in lines.values())
    figure = kvscope.plot(made, "budget_curve", metric="output_error")
    assert figure.layout.xaxis.title.text == "bytes of a head's cache, mean over the steps"
    own = next(line for line in figure.data if line.name.startswith("full"))
    assert list(own.x) == sorted(own.x)

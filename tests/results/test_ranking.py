"""Which runs are ranked among each other, and which are named as the best."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kvscope.core.summary_records import MetricSummary, RunSummary, SummaryRecord
from kvscope.results.ranking import KINDS, agree, best_among, best_of, kind_of
from tests.results.make import make


@pytest.fixture
def summary(tmp_path: Path) -> SummaryRecord:
    return make(tmp_path / "r", [8, 8], policies=("h2o", "tova", "snapkv", "quest", "belady")).summary


def figures(run: RunSummary, mass: float, error: float, **changes: object) -> RunSummary:
    metrics = {"retained_mass": MetricSummary(mass, count=3), "output_error": MetricSummary(error, count=3)}
    return replace(run, metrics=metrics, **changes)  # type: ignore[arg-type]


def test_every_kind_has_its_best_by_each_metric(summary: SummaryRecord) -> None:
    h2o, tova, snapkv, quest, belady = summary.runs
    runs = [
        figures(h2o, 0.6, 0.3),
        figures(tova, 0.7, 0.4),
        figures(snapkv, 0.9, 0.1, phase="prefill"),  # alone in its kind
        figures(quest, 0.95, 0.05, reads=True),
        figures(belady, 0.99, 0.01, clairvoyant=True),
        figures(belady, 0.98, 0.02, clairvoyant=True),  # two bounds, and yet no best of them
        figures(h2o, 0.8, 0.2, budget="60%"),
        figures(tova, 0.9, 0.1, budget="60%"),
    ]
    first, second = best_of(runs, summary.metrics)
    assert (first.budget, first.kind, first.count) == ("50%", "every step", 2)
    assert first.winners == {"output_error": (0.3, ("h2o",)), "retained_mass": (0.7, ("tova",))}
    assert not first.agree
    assert second.budget == "60%" and second.agree and second.winners["retained_mass"] == (0.9, ("tova",))


def test_equal_policies_share_the_place_and_a_metric_that_is_equal_names_none(summary: SummaryRecord) -> None:
    h2o, tova, snapkv, *_ = summary.runs
    (best,) = best_of(
        [figures(h2o, 0.70001, 0.3), figures(tova, 0.70004, 0.3), figures(snapkv, 0.6, 0.3)], summary.metrics
    )
    assert best.winners == {"retained_mass": (0.7, ("h2o", "tova"))}
    assert best.agree


def test_the_closed_loop_is_ranked_where_there_is_one(summary: SummaryRecord) -> None:
    h2o, tova, *_ = summary.runs
    runs = [figures(h2o, 0.9, 0.1), figures(tova, 0.1, 0.9)]
    closed = [figures(h2o, 0.2, 0.8, loop="closed"), figures(tova, 0.8, 0.2, loop="closed")]
    (best,) = best_of([*runs, *closed], summary.metrics)
    assert best.loop == "closed" and best.winners["retained_mass"] == (0.8, ("tova",))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "every step"),
        ({"phase": "prefill"}, "prompt only"),
        ({"phase": "every:8"}, "every N steps"),
        ({"phase": "none"}, "no eviction"),
        ({"reads": True}, "reads a part"),
        ({"bounded": False}, "own size"),
        ({"clairvoyant": True, "reads": True}, "bound"),
    ],
)
def test_kinds(summary: SummaryRecord, changes: dict[str, object], kind: str) -> None:
    assert kind_of(replace(summary.runs[0], **changes)) == kind and kind in KINDS  # type: ignore[arg-type]


def test_the_best_among_means_and_whether_metrics_agree() -> None:
    means = [(0.50001, "a"), (0.50004, "b"), (0.4, "c")]
    assert best_among(means, "higher") == (0.5, ("a", "b"))
    assert best_among(means, "lower") == (0.4, ("c",))
    assert best_among(means, "none") is None and best_among(means[:2], "higher") is None
    assert agree([]) and agree([["a", "b"], ["b"]]) and not agree([["a"], ["b"], ["a", "b"]])

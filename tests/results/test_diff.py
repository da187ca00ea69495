"""The gate: what fell must fail the build, whatever else rose."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvscope.core.errors import ResultError, UsageError
from kvscope.core.summary_records import SUMMARY, SummaryRecord
from kvscope.results import diff as module
from kvscope.results.baseline import load_summary
from kvscope.results.diff import ALIGNED, NOTHING_COMMON, Diff
from kvscope.results.tolerance import Tolerance, parse_tolerance
from tests.results.make import METRICS, make

OTHERS = {
    "params": {"alpha": 0.5},
    "prefill": "full",
    "loop": "closed",
    "phase": "prefill",
    "accumulate": "float16",
    "cache": "fp8",
    "merge": "d2o(beta=0.5)",
}


def record(summary: dict) -> SummaryRecord:
    """Return the record of edited data; a mean that no JSON file can hold is put in afterwards."""
    odd = {}
    plain = copy.deepcopy(summary)
    for place, run in enumerate(plain["runs"]):
        for name, value in run["metrics"].items():
            if value["mean"] is not None and not math.isfinite(value["mean"]):
                odd[place, name], value["mean"] = value["mean"], None
    made = SUMMARY.decode(plain, Path("summary.json"), SummaryRecord)
    for (place, name), mean in odd.items():
        object.__setattr__(made.runs[place].metrics[name], "mean", mean)
    return made


def diff(base: dict, new: dict, *arguments: Any, **options: Any) -> Diff:
    return module.diff(record(base), record(new), *arguments, **options)


def loaded(path: Path) -> dict:
    return SUMMARY.plain(load_summary(path))


@pytest.fixture
def base(tmp_path: Path) -> dict:
    return loaded(make(tmp_path / "base", [8]).path)


def changed(base: dict, metric: str, by: float | None) -> dict:
    new = copy.deepcopy(base)
    entry = new["runs"][0]["metrics"][metric]
    entry["mean"] = None if by is None else entry["mean"] + by
    return new


@pytest.mark.parametrize(
    ("metric", "by", "verdict", "fails"),
    [
        ("retained_mass", -0.02, "worse", True),
        ("retained_mass", -0.005, "same", False),
        ("retained_mass", 0.02, "better", False),
        ("output_error", 0.02, "worse", True),
        ("output_error", -0.02, "better", False),
        ("held_keys", 0.02, "changed", False),
        ("held_keys", -0.02, "changed", False),
        ("retained_mass", None, "missing", True),
    ],
)
def test_verdicts(base: dict, metric: str, by: float | None, verdict: str, fails: bool) -> None:
    found = diff(base, changed(base, metric, by), 0.01)
    (row,) = [row for row in found.rows if row.metric == metric and row.run.startswith("h2o")]
    assert row.verdict == verdict
    assert found.regressed == fails
    assert {r.verdict for r in found.rows if r is not row} == {"same"}


def test_equal_is_equal(base: dict) -> None:
    assert not diff(base, base, 0.0).regressed


def test_a_run_that_vanished_fails_and_a_new_one_does_not(base: dict) -> None:
    fewer = copy.deepcopy(base)
    del fewer["runs"][1]
    assert {row.verdict for row in diff(base, fewer).regressions} == {"missing"}
    grown = diff(fewer, base)
    assert {row.verdict for row in grown.rows} == {"same", "new"}
    assert not grown.regressed


def test_sides_without_a_common_run_say_what_compares_policies(base: dict) -> None:
    other = copy.deepcopy(base)
    for run in other["runs"]:
        run["budget"] = "7%"
    assert NOTHING_COMMON in diff(base, other).verdict()
    other["runs"][0]["budget"] = base["runs"][0]["budget"]
    assert NOTHING_COMMON not in diff(base, other).verdict()


def test_one_tolerance_for_each_metric(base: dict) -> None:
    new = changed(base, "retained_mass", -0.02)
    assert not diff(base, new, {"": 0.0, "retained_mass": 0.05}).regressed
    assert diff(base, new, {"": 0.05, "retained_mass": 0.0}).regressed
    with pytest.raises(UsageError, match="tolerance is for metric 'retained_mas'"):
        diff(base, new, {"retained_mas": 0.1})


def test_a_relative_tolerance_is_of_the_base(base: dict) -> None:
    mean = base["runs"][0]["metrics"]["retained_mass"]["mean"]
    for share, fails in ((0.02, False), (0.04, True)):
        new = changed(base, "retained_mass", -share * mean)
        found = diff(base, new, {"retained_mass": Tolerance(3, relative=True)})
        assert found.regressed == fails
        row = next(row for row in found.rows if row.metric == "retained_mass")
        assert (row.tolerance, row.stated) == (pytest.approx(0.03 * mean), "3%")
    zero = copy.deepcopy(base)
    zero["runs"][0]["metrics"]["output_error"]["mean"] = 0.0
    assert diff(zero, changed(zero, "output_error", 1e-9), Tolerance(50, relative=True)).regressed, "of 0 it is 0"


@pytest.mark.parametrize("choice", ["phase", "allocate", "accumulate"])
def test_another_plan_is_another_run(base: dict, choice: str) -> None:
    """A policy that evicts at other times is not the same run with other values."""
    new = copy.deepcopy(base)
    new["runs"][0][choice] = OTHERS.get(choice, "another")
    assert {row.verdict for row in diff(base, new).rows if row.run.startswith("h2o")} == {"missing", "new"}


@pytest.mark.parametrize("what", [*ALIGNED, "params"])
def test_runs_that_differ_in_one_way_stand_side_by_side(base: dict, what: str) -> None:
    """As an open and a closed run of one policy do in one replay."""
    base["runs"].append(copy.deepcopy(base["runs"][0]) | {what: OTHERS.get(what, "another")})
    found = diff(base, base)
    assert len(found.rows) == len(METRICS) * len(base["runs"])
    assert {row.verdict for row in found.rows} == {"same"}


def test_a_parameter_that_an_earlier_version_lacks_has_its_default(base: dict) -> None:
    """A baseline in git stays one when a policy gets a new parameter."""
    new = copy.deepcopy(base)
    for run in new["runs"]:
        run["params"] = run["params"] | {"reduce": "scores"}
    assert {row.verdict for row in diff(base, new).rows} == {"same"} == {row.verdict for row in diff(new, base).rows}
    changed = copy.deepcopy(new["runs"][0]) | {"label": "h2o(reduce=rows)"}
    changed["params"] = changed["params"] | {"reduce": "rows"}
    new["runs"].insert(0, changed)  # it is the first that could be taken for the run without the parameter
    rows = diff(base, new).rows
    assert {row.verdict for row in rows} == {"same", "new"}
    assert {row.run for row in rows if row.verdict == "new"} == {
        f"h2o(reduce=rows) {base['runs'][0]['budget']} stream open"
    }


def test_a_long_comparison_shows_what_is_not_the_same(base: dict) -> None:
    base["runs"] = [copy.deepcopy(base["runs"][0]) | {"budget": f"{keys}"} for keys in range(1, 20)]
    new = changed(base, "retained_mass", -0.1)
    found = diff(base, new)
    assert len(found.rows) == 57
    assert [row.verdict for row in found.shown()] == ["worse"]
    assert found.shown(everything=True) == found.rows
    assert found.verdict() == "57 values: 1 worse, 56 same."


def test_other_traces_cannot_be_compared(base: dict, tmp_path: Path) -> None:
    other = loaded(make(tmp_path / "other", [8], identity="xyz").path)
    with pytest.raises(ResultError, match="identity abc and xyz"):
        diff(base, other)


@pytest.mark.parametrize(("what", "other"), [("prefill", "full"), ("loop", "closed")])
def test_other_protocols_cannot_be_compared(base: dict, what: str, other: str) -> None:
    new = copy.deepcopy(base)
    for run in new["runs"]:
        run[what] = other
    with pytest.raises(ResultError, match=f"different protocols: {what}"):
        diff(base, new)


def test_other_definitions_cannot_be_compared(base: dict) -> None:
    new = copy.deepcopy(base)
    new["metrics"]["retained_mass"]["range"] = [0, 100]
    with pytest.raises(ResultError, match=r"metric retained_mass differ.*range \(0.0, 1.0\) and \(0.0, 100.0\)"):
        diff(base, new)
    new["metrics"]["retained_mass"] = {**base["metrics"]["retained_mass"], "summary": "in other words"}
    assert not diff(base, new).regressed


def test_long_names_are_told_apart(base: dict) -> None:
    """Both values are in the message: names that begin alike must not be cut to the same text."""
    new = copy.deepcopy(base)
    base["trace"]["model"], new["trace"]["model"] = "meta-llama/Meta-Llama-3-8B", "meta-llama/Meta-Llama-3-70B"
    with pytest.raises(ResultError, match="meta-llama/Meta-Llama-3-8B and meta-llama/Meta-Llama-3-70B"):
        diff(base, new)


@pytest.mark.parametrize("metric", list(METRICS))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), None])
def test_no_number_is_never_better(base: dict, metric: str, value: float | None) -> None:
    new = copy.deepcopy(base)
    new["runs"][0]["metrics"][metric]["mean"] = value
    assert [row.verdict for row in diff(base, new, 1.0).regressions] == ["missing"]


def test_a_second_run_of_the_same_name_hides_nothing(base: dict) -> None:
    new = copy.deepcopy(base)
    new["runs"].append(copy.deepcopy(base["runs"][0]))
    new["runs"][0]["metrics"]["retained_mass"]["mean"] -= 0.5
    with pytest.raises(ResultError, match="two runs of h2o at 50%"):
        diff(base, new)


def without(base: dict, key: str) -> dict:
    return {name: value for name, value in base.items() if name != key}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda s: {**s, "trace": None}, "trace: expected `object`, got `null`"),
        (lambda s: {**s, "trace": {}}, "trace: is missing the field `name`"),
        (lambda s: without(s, "metrics"), "missing the field `metrics`"),
        (lambda s: {**s, "metrics": {"retained_mass": {"direction": "up"}}}, "direction: invalid enum value 'up'"),
        (lambda s: {**s, "runs": ["h2o"]}, r"runs\[0\]: expected `object`, got `str`"),
        (lambda s: {**s, "runs": [without(s["runs"][0], "prefill")]}, r"runs\[0\]: .*missing the field `prefill`"),
        (lambda s: {**s, "runs": [{**s["runs"][0], "metrics": 1}]}, r"runs\[0\].metrics: expected `object`"),
        (lambda s: {**s, "runs": [{**s["runs"][0], "metrics": {"held_keys": {"mean": "9"}}}]}, "mean: expected `float"),
        (lambda s: {**s, "runs": [{**s["runs"][0], "metrics": {"held_keys": {"mean": float("nan")}}}]}, "not JSON"),
        (lambda s: {**s, "runs": [{**s["runs"][0], "metrics": {"undeclared": {"mean": 1.0}}}]}, "'undeclared'"),
    ],
)
def test_a_summary_edited_by_hand_says_what_it_lacks(base: dict, tmp_path: Path, change: Callable, fault: str) -> None:
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps(change(base)))
    with pytest.raises(ResultError, match=f"baseline.json is damaged.*{fault}"):
        load_summary(file)


def test_a_committed_summary_is_a_baseline(base: dict, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    file.write_bytes((tmp_path / "base" / "summary.json").read_bytes())
    assert not diff(loaded(file), base).regressed
    file.write_text(json.dumps({"kind": "kvscope-summary", "schema": 1}))
    with pytest.raises(ResultError, match="damaged"):
        load_summary(file)
    file.write_text("{")
    with pytest.raises(ResultError, match="not JSON"):
        load_summary(file)
    with pytest.raises(ResultError, match="no replay at"):
        load_summary(tmp_path / "none.json")


def test_tolerances_are_parsed() -> None:
    assert parse_tolerance(["0.01", "retained_mass=0.5%,held_keys=1"]) == {
        "": Tolerance(0.01),
        "retained_mass": Tolerance(0.5, relative=True),
        "held_keys": Tolerance(1.0),
    }
    for bad in ("x", "retained_mass=", "-1", "nan", "inf", "", "%", "1%%", "-1%"):
        with pytest.raises(UsageError, match="tolerance"):
            parse_tolerance([bad])


def test_to_dict_is_json(base: dict) -> None:
    found = diff(base, base).to_dict()
    assert json.loads(json.dumps(found, allow_nan=False))["regressed"] is False

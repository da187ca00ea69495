"""The open loop with quantised caches: rows from stored queries and the keys that a cache has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kvscope
from kvscope.core.errors import UsageError
from kvscope.core.options import ClosedLoopOptions
from kvscope.results.diff import diff
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace, open_trace
from tests.trace.make import record as record_small

EXAMPLE = Path(__file__).parents[2] / "traces" / "example"
CACHES = "16bit,int8(group=8,residual=8),int4(group=8,residual=8),int2(group=8,residual=8),fp8"


@pytest.fixture(scope="module")
def example() -> Trace:
    return open_trace(EXAMPLE)


@pytest.fixture(scope="module")
def made(example: Trace, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    folder = tmp_path_factory.mktemp("replays") / "coded"
    return kvscope.replay(example, ["full", "h2o"], "20%", cache=CACHES, output=folder)


def test_labels_and_records_name_the_cache(made: Replay) -> None:
    caches = [run.cache for run in made.info.runs if run.policy == "h2o"]
    assert caches == [
        None,
        "int8:kivi(group=8,residual=8)",
        "int4:kivi(group=8,residual=8)",
        "int2:kivi(group=8,residual=8)",
        "fp8",
    ]
    assert made.info.runs[1].label == "full + int8:kivi(group=8,residual=8)"


def test_fewer_bits_are_smaller_and_farther(made: Replay) -> None:
    for policy in ("full", "h2o"):
        runs = [run for run in made.summary.runs if run.policy == policy]
        sizes = [run.mean("cache_bytes") or 0 for run in runs[:4]]
        assert sizes == sorted(sizes, reverse=True) and sizes[3] < sizes[0] / 1.4
        errors = [run.mean("output_error") or 0 for run in runs[:4]]
        assert errors == sorted(errors)


def test_sixteen_bit_is_unchanged_beside_other_caches(example: Trace, made: Replay, tmp_path: Path) -> None:
    alone = kvscope.replay(example, ["h2o"], "20%", output=tmp_path / "alone")
    (run,) = alone.summary.runs
    other = next(each for each in made.summary.runs if each.policy == "h2o" and each.cache is None)
    assert run.decisions == other.decisions
    assert all(other.metrics[name] == value for name, value in run.metrics.items())


def test_a_code_of_many_bits_evicts_as_the_recorded_rows_do(made: Replay) -> None:
    """Rows from vectors and 8 bit codes are near the recorded ones: the retained mass agrees to three digits."""
    plain, coded = (run.mean("retained_mass") for run in made.summary.runs if run.policy == "h2o" and run.run in (5, 6))
    np.testing.assert_allclose(plain, coded, atol=2e-3)


def test_runs_with_other_caches_are_not_compared(made: Replay, example: Trace, tmp_path: Path) -> None:
    """`h2o` in 16 bit and in 4 bit have one policy, budget and parameters: they are two runs all the same."""
    alone = kvscope.replay(example, ["h2o"], "20%", cache="int4(group=8,residual=8)", output=tmp_path / "coded")
    plain = kvscope.replay(example, ["h2o"], "20%", output=tmp_path / "plain")
    found = diff(plain.summary, alone.summary)
    assert {row.verdict for row in found.rows} == {"missing", "new"}, "no row compares the two"


def test_what_the_open_loop_lacks_is_named(example: Trace, tmp_path: Path) -> None:
    record_small(tmp_path / "small", lengths=[14, 9], heads=4, kv_heads=2)
    with pytest.raises(UsageError, match="does not store queries, keys and values"):
        kvscope.replay(open_trace(tmp_path / "small"), "h2o", "2", cache="int4")
    with pytest.raises(UsageError, match="keys after rotation only"):
        kvscope.replay(example, "h2o", "20%", cache="int4:kvquant")
    with pytest.raises(UsageError, match="is a bound for keys in 16 bits"):
        kvscope.replay(example, "belady", "20%", cache="int4")
    with pytest.raises(UsageError, match="--accumulate compares with sums in float32"):
        kvscope.replay(example, "h2o", "20%", cache="int4", accumulate="float16")


def test_a_cache_of_the_closed_loop_alone(example: Trace, tmp_path: Path) -> None:
    made = kvscope.replay(
        example, "tova", "20%", cache="16bit,int4:kvquant", closed=ClosedLoopOptions(), output=tmp_path / "r"
    )
    assert [(run.loop, run.label, run.open_run) for run in made.info.runs] == [
        ("open", "tova", None),
        ("closed", "tova", 0),
        ("closed", "tova + int4:kvquant", None),
    ]

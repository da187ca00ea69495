"""Two policies on the same sequences: the right runs, the right values, and no claim beyond them."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest

from kvscope.analysis.compare import compare
from kvscope.core.errors import ResultError, UsageError
from kvscope.core.records import REPLAY, ReplayRecord
from kvscope.results.schema import TOKENS
from kvscope.results.store import Replay
from kvscope.results.writer import ReplayWriter
from tests.results.make import METRICS, info, make, values

LENGTHS = [6, 7, 8, 6, 7, 9]


def several(
    path: Path, runs: list[dict], lengths: list[int] = LENGTHS, shift: dict[int, float] | None = None
) -> Replay:
    """Return a replay of runs with random values; each entry of `runs` is laid over a description."""
    about = REPLAY.plain(info(lengths, policies=tuple(run["policy"] for run in runs)))
    about["runs"] = [run | own for run, own in zip(about["runs"], runs, strict=True)]
    record = REPLAY.decode(about, path, ReplayRecord)
    with ReplayWriter(path, record) as writer:
        for run in range(len(runs)):
            for sequence, length in enumerate(lengths):
                drawn = values(10 * sequence, length, empty=runs[run].get("policy") == "full")
                by = np.float32((shift or {}).get(run, 0.0))
                writer.fidelity(
                    run, sequence, 0, np.arange(length), {name: array + by for name, array in drawn.items()}
                )
        return writer.finish()


def of_sequence(run: int, sequence: int, length: int, name: str) -> float:
    """Mean over steps, then heads, then layers, with loops."""
    layers = []
    for layer in (0, 1):
        heads = []
        for row in values(100 * run + 10 * sequence + layer, length)[name]:
            there = [float(value) for value in row if not math.isnan(value)]
            heads.append(sum(there) / len(there))
        layers.append(sum(heads) / len(heads))
    return sum(layers) / len(layers)


def test_values_equal_plain_loops(tmp_path: Path) -> None:
    replay = make(tmp_path / "r", LENGTHS)
    found = compare((replay, "h2o"), (replay, "tova"))
    assert [row.metric for row in found.rows] == [name for name, item in METRICS.items() if item["direction"] != "none"]
    for row in found.rows:
        a, b = ([of_sequence(run, s, length, row.metric) for s, length in enumerate(LENGTHS)] for run in (0, 1))
        assert row.paired.mean_a == pytest.approx(sum(a) / 6, abs=1e-6)
        assert row.paired.mean_a == pytest.approx(replay.summary.runs[0].metrics[row.metric].mean, abs=1e-12)
        assert row.paired.difference == pytest.approx((sum(b) - sum(a)) / 6, abs=1e-6)
        assert (row.paired.above, row.paired.below) == (
            sum(y > x for x, y in zip(a, b, strict=True)),
            sum(y < x for x, y in zip(a, b, strict=True)),
        )


def test_who_is_better_follows_the_direction(tmp_path: Path) -> None:
    replay = several(tmp_path / "r", [{"policy": "h2o"}, {"policy": "tova"}], shift={1: 0.5})
    better = {row.metric: row.better for row in compare((replay, "h2o"), (replay, "tova"), list(METRICS)).rows}
    assert better == {"retained_mass": "B", "output_error": "A", "held_keys": ""}
    assert compare((replay, "h2o"), (replay, "h2o")).rows[0].better == ""
    few = several(tmp_path / "few", [{"policy": "h2o"}, {"policy": "tova"}], LENGTHS[:5], {1: 0.5})
    found = compare((few, "h2o"), (few, "tova"), ["retained_mass"])
    assert found.rows[0].better == ""
    assert found.warnings[-1].startswith("5 sequences: p cannot go below 0.062")


def test_every_common_budget_and_no_other(tmp_path: Path) -> None:
    runs = [
        {"policy": "h2o", "budget": "10%"},
        {"policy": "h2o", "budget": "20%"},
        {"policy": "tova", "budget": "20%"},
        {"policy": "tova", "budget": "40%"},
        {"policy": "a2sf", "budget": "80%"},
        {"policy": "quest", "budget": None},
    ]
    replay = several(tmp_path / "r", runs)
    budgets = {row.budget for row in compare((replay, "h2o"), (replay, "tova")).rows}
    assert budgets == {"20%"}
    assert [row.budget for row in compare((replay, "h2o"), (replay, "quest"), ["retained_mass"]).rows] == [
        "10% and no budget",
        "20% and no budget",
    ]
    assert [row.budget for row in compare((replay, "0"), (replay, "3"), ["retained_mass"]).rows] == ["10% and 40%"]
    with pytest.raises(UsageError, match=r"no budget in common: h2o at 10% \(open loop\), 20%.* and a2sf at 80%"):
        compare((replay, "h2o"), (replay, "a2sf"))


def test_unlike_pairs_are_warned_of(tmp_path: Path) -> None:
    runs = [{"policy": "h2o"}, {"policy": "snapkv", "phase": "prefill"}]
    replay = several(tmp_path / "r", runs, shift={1: 0.5})
    warnings = compare((replay, "h2o"), (replay, "snapkv")).warnings
    assert warnings[0] == "A and B evict at different times: step and prefill"
    assert warnings[1].startswith("50% is not the same for both: A holds ")
    assert compare((replay, "h2o"), (replay, "h2o"), ["held_keys"]).warnings == []


def test_a_policy_is_named_by_label_name_or_number(tmp_path: Path) -> None:
    runs = [
        {"policy": "a2sf", "label": "a2sf(alpha=0.2)", "params": {"alpha": 0.2}},
        {"policy": "a2sf", "label": "a2sf(alpha=0.7)", "params": {"alpha": 0.7}},
        {"policy": "tova"},
    ]
    replay = several(tmp_path / "r", runs)
    assert compare((replay, "a2sf(alpha=0.7)"), (replay, "tova")).a == "a2sf(alpha=0.7)"
    assert compare((replay, "1"), (replay, "tova")).a == "a2sf(alpha=0.7)"
    with pytest.raises(UsageError, match="a2sf is ambiguous: several policies") as caught:
        compare((replay, "a2sf"), (replay, "tova"))
    assert "a2sf(alpha=0.2) or a2sf(alpha=0.7)" in caught.value.todo
    with pytest.raises(UsageError, match="no policy 'tofa'") as caught:
        compare((replay, "tova"), (replay, "tofa"))
    assert "tova" in caught.value.todo
    with pytest.raises(UsageError, match="no metric is called 'retained_mas'"):
        compare((replay, "0"), (replay, "1"), ["retained_mas"])


def test_two_replays_must_be_of_one_trace(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one", LENGTHS), make(tmp_path / "other", LENGTHS, shift=0.25)
    found = compare((one, "h2o"), (other, "h2o"), ["retained_mass"])
    assert (found.a, found.b) == ("h2o of one", "h2o of other")
    assert found.rows[0].paired.difference == pytest.approx(0.25, abs=1e-6)
    assert found.rows[0].to_dict()["above"] == 6
    with pytest.raises(ResultError, match="different traces"):
        compare((one, "h2o"), (make(tmp_path / "foreign", LENGTHS, identity="xyz"), "h2o"))


def test_where_nothing_was_evicted_there_is_nothing_to_compare(tmp_path: Path) -> None:
    replay = several(tmp_path / "r", [{"policy": "full"}, {"policy": "h2o"}])
    found = compare((replay, "full"), (replay, "h2o"))
    assert found.rows == []
    assert copy.deepcopy(found).to_dict()["rows"] == []


def test_what_a_closed_loop_costs_is_compared_by_sequence(tmp_path: Path) -> None:
    about = info([6, 7], policies=("h2o", "tova"))
    losses = {}
    with ReplayWriter(tmp_path / "r", about) as writer:
        for run, sequence in np.ndindex(2, 2):
            writer.fidelity(run, sequence, 0, np.arange(6), values(run, 6))
            losses[run, sequence] = np.random.default_rng(10 * run + sequence).random(4).astype(np.float32)
            rest = {name: np.zeros(4, np.float32) for name in TOKENS.names[3:]}
            writer.tokens(run, sequence, np.arange(4), {**rest, "nll_policy": losses[run, sequence]})
        replay = writer.finish()
    found = compare((replay, "h2o"), (replay, "tova"), ["perplexity", "token_kl"])
    expected = [[math.exp(losses[run, sequence].mean()) for sequence in (0, 1)] for run in (0, 1)]
    assert found.rows[0].paired.mean_a == pytest.approx(sum(expected[0]) / 2, rel=1e-6)
    assert found.rows[0].paired.mean_b == pytest.approx(sum(expected[1]) / 2, rel=1e-6)
    assert found.rows[0].direction == "lower"
    assert found.rows[1].paired.equal == 2

"""Regret from a replay and its trace: it adds up to the mass that was not retained, and names planted facts."""

import re
from pathlib import Path

import numpy as np
import pytest

from kvscope.analysis.find_regrets import blocks, regrets
from kvscope.core.errors import ResultError
from kvscope.replay.run import replay
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace, open_trace
from tests.reference import regret as twin
from tests.trace.make import record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def example() -> Trace:
    return open_trace(ROOT / "traces" / "example")


@pytest.fixture(scope="module")
def replayed(example: Trace, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    policies = ["window", "h2o", "tova", "recycled-attention", "full", "ideal"]
    return replay(example, policies, "20%", output=tmp_path_factory.mktemp("regrets") / "r", metrics=["retained_mass"])


@pytest.fixture(scope="module")
def found(replayed: Replay, example: Trace) -> dict[str, dict]:
    return {run["policy"]: run for run in regrets(replayed, example, top=20)["runs"]}


def test_regret_and_retained_mass_are_one_whole(example: Trace, replayed: Replay, found: dict[str, dict]) -> None:
    """Of rows that sum to one, what is not retained is regretted, step by step."""
    sums = np.mean([example.attention(0, layer).sum(-1)[:, example.sequences[0].prompt :] for layer in example.layers])
    for run in replayed.summary.runs:
        retained = replayed.fidelity(run.run)["retained_mass"].fillna(1.0).mean()
        assert found[run.policy]["per_step"] == pytest.approx((1 - retained) * sums, abs=2e-4)
    assert found["full"]["mass"] == 0 and found["full"]["worst"] == []


def test_policies_that_lose_the_planted_facts_regret_their_tokens(example: Trace, found: dict[str, dict]) -> None:
    """The fact that the model is asked for last was out of every window when it answered: its digits head the list."""
    tokens = example.tokens(0)
    text = "".join(tokens["text"])
    ends = np.cumsum([len(each) for each in tokens["text"]])
    planted = set()
    for match in re.finditer(r"Note: \w+ \w+ (\d+)\.", text):
        first, last = (int(np.searchsorted(ends, place, "right")) for place in (match.start(1), match.end(1) - 1))
        planted |= set(range(first, last + 1))
    assert len(planted) == 6
    for policy in ("window", "h2o", "tova"):
        run = found[policy]
        worst = [each for each in run["worst"] if each["key"] in planted]
        assert len(worst) >= 2, policy
        assert all(each["kind"] == "digits" and each["text"].isdigit() for each in worst)
        most = max(worst, key=lambda each: each["weights"][0])
        assert most["weights"][0] > 0.9, "a head that copies puts nearly all of its attention there"
        assert most["wanted"][0] >= example.sequences[0].prompt
        assert planted & {each["key"] for each in run["tokens"][:5]}, policy
    chosen_anew = [each for each in found["ideal"]["worst"] if each["key"] in planted]
    assert all(each["weights"][0] < 0.5 for each in chosen_anew), "a policy that sees what it wants regrets no fact"


def test_the_parts_add_up(example: Trace, found: dict[str, dict]) -> None:
    text = "".join(example.tokens(0)["text"])
    for run in found.values():
        for part in ("kinds", "lags"):
            assert sum(each["mass"] for each in run[part]) == pytest.approx(run["mass"])
        assert len(run["worst"]) <= 20 and len(run["tokens"]) <= 20
        for each in run["worst"]:
            assert each["gone"] < each["wanted"][0] and each["mass"] >= each["weights"][0]
            assert each["before"] + each["text"] + each["after"] in text


def test_several_sequences_groups_and_readers_equal_the_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvscope.analysis.find_regrets.BLOCK_BYTES", 600)  # a few rows at a time
    record(tmp_path / "t", lengths=[13, 9], heads=4, kv_heads=2)
    trace = open_trace(tmp_path / "t")
    assert [start for start, _ in blocks(trace, 0, 0)] == [0, 2, 4, 6, 8, 10, 12]
    made = replay(trace, ["h2o", "recycled-attention:stride=3"], "30%", output=tmp_path / "r", prefill="stream")
    seen: list[float] = []
    found = regrets(made, trace, top=5, progress=seen.append)
    assert seen == [0.25, 0.5, 0.75, 1.0]
    for run in found["runs"]:
        every = []
        for sequence, of in enumerate(trace.sequences):
            for layer in trace.layers:
                frame = made.residency(run["run"], sequence, layer)
                stays = [
                    (row.kv_head, row.key, row.enter, None if row.leave is None else row.leave)
                    for row in frame.astype(object).where(frame.notna(), None).itertuples()
                ]
                rows = trace.attention(sequence, layer).reshape(2, 2, of.length, of.length).mean(1)
                for head, keys in enumerate(twin.regret(rows.tolist(), stays)):
                    every += [(own.mass, sequence, layer, head, key) for key, own in enumerate(keys)]
        every.sort(key=lambda each: -each[0])
        assert run["mass"] == pytest.approx(sum(each[0] for each in every), rel=1e-5)
        for got, expected in zip(run["worst"], every, strict=False):
            assert got["mass"] == pytest.approx(expected[0], rel=1e-5)
            assert (got["sequence"], got["layer"], got["kv_head"], got["key"]) == expected[1:]
    assert regrets(made, trace, [1])["runs"][0]["policy"] == "recycled-attention"


def test_another_trace_is_refused(replayed: Replay, tmp_path: Path) -> None:
    record(tmp_path / "t", lengths=[9])
    with pytest.raises(ResultError, match="was not made from"):
        regrets(replayed, open_trace(tmp_path / "t"))

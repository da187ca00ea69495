"""A trace whose layers differ in their heads gives, layer by layer, what traces of the like layers alone give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kvscope.analysis.find_regrets import regrets
from kvscope.core.errors import UsageError
from kvscope.core.options import OutputOptions, PlanOptions, Prefill, ReplayOptions, TuneLevel, TuneOptions
from kvscope.engine.layers import head_groups
from kvscope.engine.plan import FILTER
from kvscope.replay.compile import compile_replay
from kvscope.replay.rescore import rescore
from kvscope.results.residency import read_residency
from kvscope.results.store import Replay
from kvscope.results.tables import fault_of_rows
from kvscope.trace.reader import Trace
from kvscope.tune.compile import compile_tune
from tests.policies.test_contract import SPECS, goes, plan
from tests.trace.layers import HEADS, LENGTH, PROMPT, record, rows_of

BUDGET = 12
# All but those that share a budget among layers, and gates, for which the trace has no layer inputs.
SHARED = ("pyramid", "cake", "heads", "decay")
BY_PLACE = ("lacache", "switch")  # what a layer does depends on its place in the model
ALONE = [  # a gate, an index and rotations are those of a model, and the traces of this file have none
    spec
    for spec in SPECS
    if plan(spec).allocate not in SHARED
    and not spec.startswith(BY_PLACE)
    and not plan(spec).gates
    and not plan(spec).scorers
    and not any(need.startswith(FILTER) for need in plan(spec).needs)
    and not {"selection", "rotary", "value_out_l1", "reconstruction", "token_kinds"} & plan(spec).needs
]


def replayed(
    trace: Trace,
    output: Path,
    specs: Sequence[str],
    options: ReplayOptions = ReplayOptions(),  # noqa: B008  frozen
    budget: str = str(BUDGET),
) -> Replay:
    return compile_replay(trace, specs, budget, options).execute(OutputOptions(output))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return record(tmp_path_factory.mktemp("mixed") / "t")


def tables(replay: Replay) -> list[pd.DataFrame]:
    return [frame.reset_index(drop=True) for frame in (replay.residency(), replay.fidelity())]


def of_layers(frame: pd.DataFrame, layers: Sequence[int]) -> pd.DataFrame:
    return frame[frame["layer"].isin(layers)].reset_index(drop=True)


def held(replay: Replay, run: int, layer: int) -> list[int]:
    """Return how many keys each head holds after the prompt's last step."""
    return read_residency(replay, 0, layer, [run])[run].held(PROMPT - 1, PROMPT)[:, 0].sum(-1).tolist()


def test_layers_are_grouped_by_their_heads_and_sizes(mixed: Trace) -> None:
    assert head_groups(mixed) == [[0, 2], [1, 3], [4], [5]]


@pytest.mark.slow
@pytest.mark.parametrize(("store", "prefill"), [("maps+vectors", "full"), ("maps+vectors", "stream"), ("qkv", "full")])
def test_decisions_and_metrics_of_every_policy_equal_those_of_like_layers_alone(
    tmp_path: Path, store: str, prefill: str
) -> None:
    trace = record(tmp_path / "t", store=store)
    specs = [spec for spec in ALONE if goes(plan(spec), prefill) and "easykv" not in spec]
    options = ReplayOptions(prefill=Prefill(prefill))
    together = tables(replayed(trace, tmp_path / "r", specs, options, "13"))
    for number, layers in enumerate(head_groups(trace)):
        own = record(tmp_path / f"t{number}", layers, store)
        assert not own.header.layer_heads
        alone = tables(replayed(own, tmp_path / f"r{number}", specs, options, "13"))
        for one, other in zip(together, alone, strict=True):
            part = of_layers(one, layers)
            assert len(part) > 100
            pd.testing.assert_frame_equal(part, other, check_exact=True)


def test_heads_of_a_layer_share_their_budget_as_in_a_trace_of_that_layer(mixed: Trace, tmp_path: Path) -> None:
    options = ReplayOptions(plan=PlanOptions(allocate="ada"))
    together = replayed(mixed, tmp_path / "r", ["h2o", "a2sf"], options)
    for layer, own in enumerate(HEADS):
        alone = replayed(record(tmp_path / f"t{layer}", [layer]), tmp_path / f"r{layer}", ["h2o", "a2sf"], options)
        pd.testing.assert_frame_equal(
            of_layers(together.residency(), [layer]), alone.residency().reset_index(drop=True)
        )
        counts = held(together, 0, layer)
        assert len(counts) == own.kv_heads and sum(counts) == BUDGET * own.kv_heads
    assert any(len(set(held(together, 0, layer))) > 1 for layer in range(len(HEADS))), "some head gave keys to another"


def weights_of_cake(layers: Sequence[int]) -> list[float]:
    found = []
    for layer in layers:
        rows = rows_of(layer).astype(np.float16).astype(np.float64)[:, PROMPT - 32 : PROMPT, : PROMPT - 32]
        # live rows are divided by the sum of the whole row
        rows /= rows_of(layer).astype(np.float16).astype(np.float64)[:, PROMPT - 32 : PROMPT].sum(-1, keepdims=True)
        entropy = -(rows * np.log(np.where(rows > 0, rows, 1))).sum((1, 2)) / 32
        found.append(entropy.mean() * rows.var(1).sum(-1).mean())
    return found


@pytest.mark.parametrize("name", ["pyramid", "cake"])
def test_layers_share_a_budget_by_their_number_of_heads(mixed: Trace, tmp_path: Path, name: str) -> None:
    replay = replayed(mixed, tmp_path / "r", ["h2o:recent=0"], ReplayOptions(plan=PlanOptions(allocate=name)))
    counts = [held(replay, 0, layer) for layer in range(len(HEADS))]
    total = BUDGET * sum(own.kv_heads for own in HEADS)
    assert sum(map(sum, counts)) == total, "the total is that of a uniform share"
    assert replay.info.runs[0].allocated_keys == replay.info.runs[0].uniform_keys == total
    assert all(max(own) - min(own) <= 1 and own == sorted(own, reverse=True) for own in counts)
    line = [2 * BUDGET - BUDGET // 20 - layer * 2 * (BUDGET - BUDGET // 20) / (len(HEADS) - 1) for layer in range(6)]
    weights = line if name == "pyramid" else weights_of_cake(range(len(HEADS)))
    of_layers = np.array([own.kv_heads for own in HEADS]) * weights
    expected = total * of_layers / of_layers.sum()
    assert max(own[0] for own in counts) < PROMPT, "no layer is at its limit, so the shares are in proportion"
    assert np.abs(np.array([sum(own) for own in counts]) - expected).max() < 1


def test_a_layer_that_decides_as_one_leaves_the_rest_of_its_share(mixed: Trace, tmp_path: Path) -> None:
    replay = replayed(mixed, tmp_path / "r", ["tova"], ReplayOptions(plan=PlanOptions(allocate="pyramid")))
    run = replay.info.runs[0]
    counts = [held(replay, 0, layer) for layer in range(len(HEADS))]
    assert all(len(set(own)) == 1 for own in counts)
    assert run.allocated_keys == sum(map(sum, counts)), "keys of all heads are counted"
    lacking = (run.uniform_keys or 0) - (run.allocated_keys or 0)
    assert run.uniform_keys == BUDGET * sum(own.kv_heads for own in HEADS)
    assert 0 <= lacking <= sum(own.kv_heads - 1 for own in HEADS)


def test_scores_and_regret_are_those_of_the_layers(mixed: Trace, tmp_path: Path) -> None:
    replay = replayed(mixed, tmp_path / "r", ["h2o", "tova"])
    again = rescore(replay, mixed, ["retained_mass", "output_error"], output=tmp_path / "again")
    names = ["retained_mass", "output_error"]
    places = ["run", "sequence", "layer", "head", "step"]
    one, other = (each.fidelity().sort_values(places)[names] for each in (again, replay))
    pd.testing.assert_frame_equal(one.reset_index(drop=True), other.reset_index(drop=True))
    found = regrets(replay, mixed, top=10**6)["runs"][0]
    whole = 0.0
    for number, layers in enumerate(head_groups(mixed)):
        own = record(tmp_path / f"t{number}", layers)
        alone = regrets(replayed(own, tmp_path / f"r{number}", ["h2o", "tova"]), own, top=10**6)["runs"][0]
        whole += alone["mass"]
        here = [each for each in found["worst"] if each["layer"] in layers]
        assert here
        assert [(each["layer"], each["kv_head"], each["key"], each["mass"]) for each in here] == [
            (each["layer"], each["kv_head"], each["key"], each["mass"]) for each in alone["worst"]
        ]
    assert found["mass"] == pytest.approx(whole)


def test_a_replay_knows_the_heads_of_each_layer(mixed: Trace, tmp_path: Path) -> None:
    replay = replayed(mixed, tmp_path / "r", ["window"])
    trace = replay.info.trace
    assert [(own.heads, own.kv_heads) for own in trace.layer_heads] == [(own.heads, own.kv_heads) for own in HEADS]
    assert [replay.visible(0, 0, layer).shape for layer in (0, 1, 5)] == [(n, LENGTH, LENGTH) for n in (2, 3, 4)]
    with replay.table("residency") as file:
        table = file.read()
    head = np.where(table["layer"].to_numpy() == 0, 2, table["kv_head"].to_numpy())  # layer 0 has heads 0 and 1
    wrong = table.set_column(table.column_names.index("kv_head"), "kv_head", [head.astype(np.int32)])
    assert fault_of_rows(table, "residency", replay.info) is None
    assert fault_of_rows(wrong, "residency", replay.info) == "it has rows of a kv_head that its layer has not"


def test_layers_are_tuned_but_not_heads(tmp_path: Path) -> None:
    trace, grid = record(tmp_path / "t", sequences=3), {"alpha": ["0.1", "0.9"]}
    with pytest.raises(UsageError, match="differ in their heads\nUse --per layer"):
        compile_tune([trace], "a2sf", grid, "12", TuneOptions(level=TuneLevel.head))
    job = compile_tune([trace], "a2sf", grid, "12", TuneOptions(level=TuneLevel.layer))
    tuned = job.execute().policy
    assert [len(row) for row in tuned.choice] == [1] * len(HEADS)
    made = replayed(trace, tmp_path / "r", [tuned, "a2sf:alpha=0.1", "a2sf:alpha=0.9"])
    for layer, (number,) in enumerate(tuned.choice):
        alpha = tuned.settings[number].parameters()["alpha"]
        other = next(run.run for run in made.info.runs[1:] if run.params["alpha"] == alpha)
        mine, alone = (made.residency(run, layer=layer).drop(columns="run") for run in (0, other))
        pd.testing.assert_frame_equal(mine.reset_index(drop=True), alone.reset_index(drop=True))

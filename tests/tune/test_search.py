"""The search of ``kvscope tune``, compared with one replay per setting."""

import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvscope.core.errors import KvscopeError, ReplayError, UsageError
from kvscope.core.options import Prefill, TuneLevel, TuneOptions
from kvscope.metrics import METRICS, metric
from kvscope.metrics.base import Rows
from kvscope.policies.spec import parse_policy
from kvscope.replay.run import replay
from kvscope.trace.reader import Trace, open_trace
from kvscope.tune import search as module
from kvscope.tune.compile import compile_tune, usual_grid
from kvscope.tune.result import Tuning, to_toml
from tests.trace import make
from tests.trace.make import rows_of

LENGTHS, PROMPT, HELD_OUT = [26, 30, 24, 28, 32, 27], 14, 2
ALPHAS = ["0.0", "0.3", "0.8", "1.0"]
GRID = {"alpha": ALPHAS}


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """Six sequences, layers 0 and 2 of a model, four query heads over two key/value heads."""
    path = tmp_path_factory.mktemp("tune") / "many"
    make.record(path, lengths=LENGTHS, prompt=PROMPT, heads=4, kv_heads=2)
    return open_trace(path)


@pytest.fixture
def lost() -> Iterator[str]:
    """A metric with direction lower."""

    @metric("lost_mass", direction="lower", range=(0.0, 1.0), when_nothing_evicted=0.0)
    def lost_mass(rows: Rows) -> Any:
        """Share of the full row on evicted keys."""
        return 1 - METRICS.get("retained_mass").compute(rows)

    yield "lost_mass"
    METRICS.remove("lost_mass")


def measured(trace: Trace, spec: str, sequences: range, output: Path, name: str = "retained_mass") -> np.ndarray:
    """Return a metric per sequence, layer and key/value head, ``[sequences, 2, 2]``, from a separate replay."""
    frame = replay(trace, [spec], "40%", output=output, metrics=[name], force=True).fidelity(run=0)
    heads = frame.groupby(["sequence", "layer", "head"])[name].mean().unstack()  # over steps
    return np.array(
        [[[heads.loc[n, layer][2 * g : 2 * g + 2].mean() for g in range(2)] for layer in (0, 2)] for n in sequences]
    )


def brute(trace: Trace, output: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return ``[settings, sequences, layers, heads]`` for the searched sequences, and for the held-out ones."""
    every = [measured(trace, f"a2sf:alpha={alpha}", range(6), output) for alpha in ALPHAS]
    return np.array(every)[:, :-HELD_OUT], np.array(every)[:, -HELD_OUT:]


def tune(traces: list[Trace], policy: str, grid: Any, budget: str, *, progress: Any = None, **choices: Any) -> Tuning:
    kinds = {"level": TuneLevel, "prefill": Prefill}
    options = TuneOptions(**{name: kinds.get(name, lambda same: same)(value) for name, value in choices.items()})
    return compile_tune(traces, policy, grid, budget, options).execute(progress)


def run(trace: Trace, **choices: Any) -> Tuning:
    return tune([trace], "a2sf", GRID, "40%", **{"held_out": HELD_OUT} | choices)


def alphas(found: Tuning) -> list[list[float]]:
    """Return the setting of each head of each layer."""
    return [
        [found.policy.settings[number].alpha for number in (row * 2 if len(row) == 1 else row)]  # type: ignore[attr-defined]
        for row in found.policy.choice
    ]


@pytest.mark.parametrize("per", ["head", "layer", "model"])
def test_the_choice_equals_one_replay_per_setting(trace: Trace, tmp_path: Path, per: str) -> None:
    searched, held_out = brute(trace, tmp_path / "r")
    found = run(trace, level=per)
    scores = searched.mean(1)
    best = int(scores.mean((1, 2)).argmax())
    expected = {
        "head": scores.argmax(0),
        "layer": np.repeat(scores.mean(2).argmax(0)[:, None], 2, 1),
        "model": np.full((2, 2), best),
    }[per]
    assert alphas(found) == [[float(ALPHAS[number]) for number in row] for row in expected]
    assert found.policy.layers == (0, 2)
    assert {len(row) for row in found.policy.choice} == {2 if per == "head" else 1}
    assert len(found.policy.settings) == len(np.unique(expected)), "what nobody follows is left out"
    assert (len(np.unique(expected)) > 1) == (per != "model"), "otherwise the three kinds are one"

    own = np.take_along_axis(held_out, expected[None, None], 0)[0]  # [sequences, layers, heads]
    hindsight = int(held_out.mean((1, 2, 3)).argmax())
    assert found.best.label == parse_policy(f"a2sf:alpha={ALPHAS[best]}").label
    assert found.hindsight.label == parse_policy(f"a2sf:alpha={ALPHAS[hindsight]}").label
    assert found.held_out["tuned"] == pytest.approx(own.mean((1, 2)), abs=1e-6)
    assert found.held_out["best"] == pytest.approx(held_out[best].mean((1, 2)), abs=1e-6)
    assert found.held_out["hindsight"] == pytest.approx(held_out[hindsight].mean((1, 2)), abs=1e-6)
    chosen = np.take_along_axis(searched, expected[None, None], 0)[0]
    assert found.searched["tuned"] == pytest.approx(chosen.mean((1, 2)), abs=1e-6)
    assert found.searched["best"] == pytest.approx(searched[best].mean((1, 2)), abs=1e-6)
    assert found.gain.difference == pytest.approx(own.mean() - held_out[best].mean(), abs=1e-6)
    assert found.gain.sequences == HELD_OUT and found.gain.low is None


@pytest.mark.parametrize(("policy", "scope"), [("a2sf", "layer"), ("tova", "kv_head")])
def test_the_scope_of_a_search_is_that_of_a_replay(trace: Trace, tmp_path: Path, policy: str, scope: str) -> None:
    """A policy whose rule is for heads, and one whose parameter says what decides."""
    grid = GRID if policy == "a2sf" else {"group": ["mean", "max"]}
    found = tune([trace], policy, grid, "40%", held_out=HELD_OUT, level="layer", scope=scope)
    ((name, values),) = grid.items()
    every = []
    for value in values:
        options = {"output": tmp_path / "replay", "metrics": ["retained_mass"], "force": True, "scope": scope}
        frame = replay(trace, [f"{policy}:{name}={value}"], "40%", **options).fidelity(run=0)
        means = frame.groupby(["sequence", "layer", "head"])["retained_mass"].mean().unstack().mean(axis=1).unstack()
        every.append(means.to_numpy()[: 6 - HELD_OUT])  # [sequences, layers]
    chosen = np.array(every).mean(1).argmax(0)  # [layers]
    used = [getattr(found.policy.settings[row[0]], name) for row in found.policy.choice]
    assert [str(value) for value in used] == [values[number] for number in chosen]
    assert found.searched["tuned"] == pytest.approx(np.array(every)[chosen, :, range(2)].mean(0))
    assert tomllib.loads(to_toml(found))["scope"] == scope
    assert found.policy.traits.scope == "kv_head", "a parameter is in the file; the choice for a2sf is not"


def test_the_level_of_a_choice() -> None:
    """The first setting is best for head 0, the second for head 1 and for both; of equals the first is chosen."""
    scores = np.array([[[1.0, 0.0], [0.5, 0.5]], [[0.9, 0.8], [0.5, 0.5]]])
    assert module._choice(scores, "head", 1).tolist() == [[0, 1], [0, 0]]
    assert module._choice(scores, "layer", 1).tolist() == [[1, 1], [0, 0]]
    assert module._choice(scores, "model", 1).tolist() == [[1, 1], [1, 1]]


def test_a_tuned_policy_runs_each_head_with_its_setting(trace: Trace, tmp_path: Path) -> None:
    found = run(trace)
    (tmp_path / "tuned.toml").write_text(to_toml(found))
    together = measured(trace, f"a2sf:@{tmp_path / 'tuned.toml'}", range(6), tmp_path / "r")
    alone = {alpha: measured(trace, f"a2sf:alpha={alpha}", range(6), tmp_path / "r") for alpha in ALPHAS}
    for layer, row in enumerate(alphas(found)):
        for head, alpha in enumerate(row):
            assert together[:, layer, head].tolist() == alone[str(alpha)][:, layer, head].tolist()


def test_held_out_sequences_do_not_affect_the_choice(tmp_path: Path) -> None:
    """Other held-out sequences give the same choice, other searched sequences another choice."""
    found = []
    for name, seeds in (("a", range(6)), ("b", [0, 1, 2, 3, 14, 15]), ("c", [10, 11, 12, 13, 4, 5])):
        with pytest.MonkeyPatch.context() as patch:
            drawn = {10 * place + layer: 10 * seed + layer for place, seed in enumerate(seeds) for layer in (0, 2)}
            patch.setattr(
                make, "rows_of", lambda seed, heads, length, drawn=drawn: rows_of(1000 + drawn[seed], heads, length)
            )
            make.record(tmp_path / name, lengths=LENGTHS, prompt=PROMPT, heads=4, kv_heads=2)
        found.append(run(open_trace(tmp_path / name)))
    same, other, changed = found
    assert (same.policy, same.best, same.searched) == (other.policy, other.best, other.searched)
    assert same.held_out["tuned"] != other.held_out["tuned"]
    assert changed.policy != same.policy
    assert changed.searched != same.searched


def test_a_metric_with_direction_lower(trace: Trace, lost: str) -> None:
    more, less = run(trace), run(trace, metric=lost)
    assert less.policy == more.policy
    assert (less.best, less.hindsight) == (more.best, more.hindsight)
    for name, values in more.held_out.items():
        assert less.held_out[name] == pytest.approx([1 - value for value in values], abs=1e-6)
    assert less.searched["best"] == pytest.approx([1 - value for value in more.searched["best"]], abs=1e-6)
    assert less.gain.difference == pytest.approx(more.gain.difference, abs=1e-6), "positive where tuning helps"


def test_several_traces_are_one_list_of_sequences(trace: Trace, tmp_path: Path) -> None:
    """The last sequences of the last traces are held out, across trace boundaries."""
    for name, part in (("a", slice(0, 1)), ("b", slice(1, 5)), ("c", slice(5, 6))):
        with pytest.MonkeyPatch.context() as patch:
            shift = 10 * part.start
            patch.setattr(
                make, "rows_of", lambda seed, heads, length, shift=shift: rows_of(seed + shift, heads, length)
            )
            make.record(tmp_path / name, lengths=LENGTHS[part], prompt=PROMPT, heads=4, kv_heads=2)
    parts = [open_trace(tmp_path / name) for name in "abc"]
    found, whole = tune(parts, "a2sf", GRID, "40%", held_out=HELD_OUT), run(trace)
    assert (found.policy, found.searched, found.held_out) == (whole.policy, whole.searched, whole.held_out)
    assert found.about["traces"] == ["a", "b", "c"]


@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (6, 1), (8, 2), (13, 3)])
def test_a_quarter_is_held_out_by_default(tmp_path: Path, count: int, held_out: int) -> None:
    make.record(tmp_path / "t", lengths=[20] * count, prompt=12)
    found = tune([open_trace(tmp_path / "t")], "a2sf", GRID, "50%")
    assert (found.about["searched_sequences"], found.about["held_out_sequences"]) == (count - held_out, held_out)
    assert len(found.held_out["tuned"]) == held_out


def test_the_file_is_the_policy(trace: Trace, tmp_path: Path) -> None:
    grid = {"alpha": ["0.2", "0.7"], "group": ["mean", "max"], "normalise": ["none", "lifetime"]}
    found = tune([trace], "a2sf:sinks=1", grid, "40%", held_out=HELD_OUT, source="mine.toml")
    file = tmp_path / "mine.toml"
    file.write_text(to_toml(found), encoding="utf-8")
    assert parse_policy(f"a2sf:@{file}") == found.policy
    assert len(found.policy.settings) > 1 and all(policy.sinks == 1 for policy in found.policy.settings)  # type: ignore[attr-defined]
    data = tomllib.loads(file.read_text(encoding="utf-8"))
    assert data["held_out"]["gain"] == found.gain.difference
    assert data["held_out"]["tuned"] == pytest.approx(np.mean(found.held_out["tuned"]))
    assert data["metric"] == "retained_mass" and data["budget"] == "40%" and data["model"] == "test/tiny"
    assert all("alpha" in own for own in data["settings"]), "what was searched is written, also where it is usual"


def test_what_a_file_may_hold(trace: Trace, tmp_path: Path) -> None:
    """Non-ASCII text, booleans, and a parameter whose default cannot be written in TOML."""
    found = tune([trace], "h2o", {"group": ["mean", "max"]}, "40%", held_out=HELD_OUT, level="model")
    odd = replace(found, about=found.about | {"traces": ['a "b" é 😀']})
    file = tmp_path / "tuned.toml"
    file.write_text(to_toml(odd), encoding="utf-8")
    assert tomllib.loads(file.read_text(encoding="utf-8"))["traces"] == ['a "b" é 😀']
    assert parse_policy(f"h2o:@{file}") == found.policy
    assert found.policy.settings[0].recent is None  # type: ignore[attr-defined]


def test_a_setting_for_the_whole_model_may_change_anything(trace: Trace) -> None:
    """Settings that are never combined may protect different keys and decide per head or per layer."""
    found = tune([trace], "tova", {"scope": ["layer", "kv_head"], "sinks": ["0", "2"]}, "40%", level="model")
    assert len(found.policy.settings) == 1
    assert found.held_out["tuned"] == found.held_out["best"]
    assert found.gain.difference == 0


def test_a_policy_per_layer(trace: Trace) -> None:
    found = tune([trace], "vatp:base=tova,sinks=0", {"norm": ["l1", "none"]}, "40%", level="model")
    assert found.policy.traits.scope == "layer"
    found = tune(
        [trace], "scissorhands:recent=0", {"history": ["1", "3", "40"]}, "40%", prefill="stream", level="layer"
    )
    assert all(len(row) == 1 for row in found.policy.choice)


def test_a_layer_that_evicts_nothing_counts_as_its_metric_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sliding-window layer that never exceeds the budget evicts nothing."""
    usual = make.header

    def header(heads: int = 2, kv_heads: int = 2, stored: list[str] | None = None) -> Any:
        return replace(usual(heads, kv_heads, stored), sliding_window=[4, None], layer_types=["sliding", "full"])

    def rows_of(seed: int, heads: int, length: int) -> Any:
        rows = every_key(seed, heads, length)
        if seed % 10 == 0:  # layer 0
            rows = rows * ~np.tri(length, k=-4, dtype=bool)
            rows = rows / rows.sum(-1, keepdims=True)
        return rows

    every_key = make.rows_of
    monkeypatch.setattr(make, "header", header)
    monkeypatch.setattr(make, "rows_of", rows_of)
    make.record(tmp_path / "t", lengths=[26, 24, 25], prompt=PROMPT, heads=4, kv_heads=2)
    short = open_trace(tmp_path / "t")
    found = tune([short], "a2sf", GRID, "8")
    assert alphas(found)[0] == [0.0, 0.0], "of settings that do equally well the first"
    assert 0.5 < found.held_out["tuned"][0] < 1
    with pytest.raises(ReplayError, match="nothing is evicted in layer 0 of sequence 0: ideal_cosine has no value"):
        tune([short], "a2sf", GRID, "8", metric="ideal_cosine")
    with pytest.raises(ReplayError, match="nothing is evicted from"):
        tune([short], "a2sf", GRID, "30")


def test_progress_rises_to_one(trace: Trace) -> None:
    shares: list[float] = []
    run(trace, progress=shares.append)
    assert shares == sorted(shares)
    assert shares[0] < 0.2 and shares[-1] == 1
    assert 0.5 in shares


def test_the_usual_grid() -> None:
    grid = usual_grid("a2sf:recent=3")
    assert list(grid) == ["alpha"]
    assert {"0.0", "0.2", "1.0"} <= set(grid["alpha"])
    for name in ("tova", "window"):
        with pytest.raises(UsageError, match=f"{name} does not declare values for a search"):
            usual_grid(name)


@pytest.mark.parametrize(
    ("policy", "grid", "choices", "why"),
    [
        ("a2fs", GRID, {}, "no policy is called 'a2fs'"),
        ("a2sf", {"beta": ["1", "2"]}, {}, "has a parameter --beta"),
        ("a2sf", {"alpha": ["much", "0.1"]}, {}, "alpha='much' is not float"),
        ("a2sf", {"alpha": ["7", "0.1"]}, {}, "out of range"),
        ("a2sf", {}, {}, "nothing to search"),
        ("a2sf", {"alpha": []}, {}, "nothing to search"),
        ("a2sf", {"alpha": ["0.1", "0.10"]}, {}, "the grid has one setting"),
        ("a2sf:alpha=0.3", GRID, {}, "the grid has one setting"),
        ("a2sf", GRID, {"metric": "held_keys"}, "held_keys has no best value for a step"),
        ("a2sf", GRID, {"metric": "ideal_mass"}, "ideal_mass has no best value for a step"),
        ("a2sf", GRID, {"metric": "ideal_cosine_flattened"}, "no best value for a step"),
        ("a2sf", GRID, {"metric": "retained"}, "no metric is called 'retained'"),
        ("a2sf", GRID, {"held_out": 0}, "0 of 6 sequences cannot be held out"),
        ("a2sf", GRID, {"held_out": 6}, "6 of 6 sequences cannot be held out"),
        ("a2sf", GRID, {"budget": "120%"}, "120%"),
        ("a2sf", GRID, {"device": "abacus"}, "abacus"),
        ("tova", {"sinks": ["0", "1"]}, {}, "tova decides per layer"),
        ("ada-kv", {"kernel": ["3", "5"]}, {}, "the heads of ada-kv(kernel=3) share a budget"),
        ("a2sf", {"recent": ["0", "2"]}, {}, "at 6 keys the settings protect different keys"),
        ("a2sf", {"recent": ["4", "20"]}, {"level": "model"}, "more than the budget of 6"),
        ("tova:scope=kv_head", {"variant": ["plain", "kvpress"]}, {}, "the settings differ in policy"),
        ("quest", {"page_size": ["1", "2"]}, {}, "has no budget"),
        ("scissorhands:variant=released", {"start": ["1", "2"]}, {"prefill": "stream"}, "has no budget"),
        ("keydiff", {"nothing": ["1", "2"]}, {}, "has a parameter --nothing"),
        ("r-kv", {"mix_lambda": ["0", "1"]}, {}, "keys"),
    ],
)
def test_what_is_refused_before_any_work(
    trace: Trace, monkeypatch: pytest.MonkeyPatch, policy: str, grid: dict, choices: dict, why: str
) -> None:
    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("the search had begun")

    monkeypatch.setattr(module, "step_through", too_late)
    with pytest.raises(KvscopeError) as caught:
        tune([trace], policy, grid, **{"budget": "40%"} | choices)
    assert why in caught.value.what
    assert caught.value.todo


def test_traces_that_cannot_be_tuned_together(trace: Trace, tmp_path: Path) -> None:
    make.record(tmp_path / "one", lengths=[20], prompt=12, heads=4, kv_heads=2)
    make.record(tmp_path / "narrow", lengths=[20, 20], prompt=12)
    with pytest.raises(UsageError, match="1 of 1 sequences cannot be held out"):
        tune([open_trace(tmp_path / "one")], "a2sf", GRID, "40%")
    with pytest.raises(UsageError, match="a trace is given twice"):
        tune([trace, trace], "a2sf", GRID, "40%")
    with pytest.raises(UsageError, match="of different models"):
        tune([trace, open_trace(tmp_path / "narrow")], "a2sf", GRID, "40%")

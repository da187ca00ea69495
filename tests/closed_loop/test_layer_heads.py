"""Tiny models whose layers differ in their heads, from prompt to report, in both loops and against real decoding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvscope.closed_loop.compile import compile_verify, evaluate
from kvscope.closed_loop.passage import Passage
from kvscope.core.budget import Budget
from kvscope.core.errors import ModelError, TraceError, UsageError
from kvscope.core.options import (
    ClosedLoopOptions,
    ModelSource,
    OutputOptions,
    PlanOptions,
    Positions,
    Prefill,
    ReplayOptions,
    VerifyOptions,
)
from kvscope.core.recording_options import StoreOptions, TextOptions
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import runs_of
from kvscope.model.compile import compile_recording
from kvscope.policies.spec import parse_policy
from kvscope.policies.tuned import Tuned
from kvscope.replay.compile import compile_replay
from kvscope.report.page import page_data, report_input
from kvscope.trace.layer_records import LayerHeads
from kvscope.trace.reader import TokenSequence, Trace
from kvscope.training.train_gate import train_on_traces
from tests.closed_loop.test_closed_loop import Kept
from tests.models import build

PROMPT = " ".join(f"w{(7 * number) % 101 + 3}" for number in range(40))
EXPECTED = {
    "gemma4_text": [LayerHeads(4, 2, 8), LayerHeads(4, 2, 8), LayerHeads(4, 2, 512)],
    "mimo_v2_flash": [LayerHeads(4, 2, 8), LayerHeads(4, 2, 8), LayerHeads(4, 4, 8)],
    "gemma4_large": [LayerHeads(4, 2, 8), LayerHeads(4, 2, 8), LayerHeads(4, 1, 16)],
    "laguna": [LayerHeads(4, 2, 8), LayerHeads(8, 2, 8), LayerHeads(2, 2, 8)],
}
# What the tiny configuration of a type does not have; in the larger Gemma 4 models global layers have fewer heads, and
# their values are made from what their keys are.
MORE = {
    "laguna": ("laguna", {"num_attention_heads_per_layer": [4, 8, 2]}),
    "gemma4_large": ("gemma4_text", {"num_global_key_value_heads": 1, "attention_k_eq_v": True, "global_head_dim": 16}),
}
STORE = StoreOptions("maps+vectors")
POLICIES = ("h2o", "tova", "window", "key-norm", "keydiff", "pyramidkv", "cake", "ada-kv")


def traced(folder: Path, name: str, store: StoreOptions = STORE) -> Trace:
    model = folder / "model"
    if not model.exists():
        with pytest.MonkeyPatch.context() as patch:
            kind, changes = MORE.get(name, (name, {}))
            config = build.config_of(kind)
            known = {field: value for field, value in config.to_dict().items() if field != "per_layer_config"}
            changed = type(config)(**{**known, **changes}) if changes else config
            patch.setattr(build, "config_of", lambda _: changed)
            build.saved(model, kind)
        (folder / "prompt.txt").write_text(PROMPT)
    output = OutputOptions(folder / f"t{len(list(folder.iterdir()))}")
    text = TextOptions(max_new_tokens=10)
    return compile_recording(ModelSource(str(model)), [folder / "prompt.txt"], output, text=text, store=store).execute()


@pytest.fixture(scope="module", params=EXPECTED)
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return traced(tmp_path_factory.mktemp(request.param), request.param)


def test_the_trace_names_the_heads_of_each_layer(trace: Trace) -> None:
    expected = EXPECTED[trace.path.parent.name[:-1]]
    assert trace.header.layer_heads == expected
    for layer, own in enumerate(expected):
        queries, keys, values = trace.states(0, layer)
        assert (queries.shape[0], keys.shape[0]) == (own.heads, own.kv_heads)
        assert queries.shape[2] == keys.shape[2] == values.shape[2] == own.head_dim


@pytest.mark.parametrize("prefill", list(Prefill))
def test_real_decoding_holds_the_same_keys(trace: Trace, prefill: Prefill) -> None:
    chosen = [name for name in POLICIES if prefill is Prefill.full or name not in ("pyramidkv", "cake", "ada-kv")]
    chosen = chosen if prefill is Prefill.full else [*chosen, "streaming-llm:sinks=2", "a2sf", "random"]
    if trace.path.parent.name.startswith("laguna"):
        chosen.remove("key-norm")  # the model normalises its keys in float32: their norms differ by rounding alone
    verdicts = compile_verify(trace, chosen, "40", VerifyOptions(prefill=prefill)).execute()
    assert [one.agrees for one in verdicts] == [True] * len(chosen), verdicts
    assert all(one.decisions for one in verdicts)


@pytest.mark.parametrize("allocate", ["pyramid", "cake"])
def test_real_decoding_shares_a_budget_among_layers_as_the_closed_loop_does(trace: Trace, allocate: str) -> None:
    options = VerifyOptions(plan=PlanOptions(allocate=allocate))
    assert all(one.agrees for one in compile_verify(trace, ["h2o", "tova"], "12", options).execute())


def test_compacted_positions_hold_too(trace: Trace) -> None:
    options = VerifyOptions(closed=ClosedLoopOptions(positions=Positions.compacted))
    assert all(one.agrees for one in compile_verify(trace, ["streaming-llm:sinks=2"], "9", options).execute())


def test_both_loops_and_the_report(trace: Trace, tmp_path: Path) -> None:
    options = ReplayOptions(closed=ClosedLoopOptions())
    replay = compile_replay(trace, ["h2o", "cake", "full"], "12", options).execute(OutputOptions(tmp_path / "r"))
    frame = replay.fidelity()
    for layer, own in enumerate(trace.header.layer_heads):
        assert sorted(frame.loc[frame["layer"] == layer, "head"].unique()) == list(range(own.heads))
        held = replay.residency(layer=layer)
        assert sorted(held["kv_head"].unique()) == list(range(own.kv_heads))
    first = replay.info.runs[0]
    closed = next(run for run in replay.info.runs if run.open_run == first.run)
    # nothing before the first layer differs between the loops
    same = [replay.residency(run.run, layer=0).drop(columns="run").reset_index(drop=True) for run in (first, closed)]
    assert same[0].equals(same[1])
    cake = [run for run in replay.info.runs if run.policy == "cake"]
    assert [run.allocated_keys == run.uniform_keys for run in cake] == [True, True]
    differ = len({(own.heads, own.kv_heads) for own in trace.header.layer_heads}) > 1
    (part,) = page_data(report_input([replay], {trace.identity: trace}))["parts"].values()
    own = {
        str(layer): {"heads": one.heads, "group": one.heads // one.kv_heads}
        for layer, one in enumerate(trace.header.layer_heads)
    }
    assert part.get("own") == (own if differ else None)


def test_heads_can_be_selected_only_of_layers_that_are_alike(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="differ in their heads") as raised:
        traced(tmp_path, "mimo_v2_flash", StoreOptions(heads=(0, 1)))
    assert str(raised.value).endswith("--layers 0,1")
    trace = traced(tmp_path, "mimo_v2_flash", StoreOptions(heads=(0, 1), layers=(0, 1)))
    assert (trace.heads, trace.kv_heads, trace.header.n_heads, trace.header.layer_heads) == (2, 1, 4, [])
    whole = traced(tmp_path, "mimo_v2_flash")
    assert np.array_equal(trace.attention(0, 1), whole.attention(0, 1)[:2])


def test_every_store_has_the_rows_of_every_layer(tmp_path: Path) -> None:
    """All weights are among the heaviest that store ``topk`` keeps, so that nothing is rebuilt from sums."""
    maps, vectors, top = (
        traced(tmp_path, "mimo_v2_flash", StoreOptions(store)) for store in ("maps", "qkv", "topk:64")
    )
    for layer in range(3):
        rows = maps.attention(0, layer)
        assert np.abs(vectors.attention(0, layer) - rows).max() < 1e-3
        assert np.abs(top.attention(0, layer) - rows).max() < 1e-6
        assert maps.value_norms(0, layer).shape == vectors.value_norms(0, layer).shape == (2 + 2 * (layer == 2), 50)


def test_rows_of_modules_have_the_heads_of_their_layer(tmp_path: Path) -> None:
    trace = traced(tmp_path, "dots3_note_text", StoreOptions("maps"))
    assert [(own.heads, own.kv_heads) for own in trace.header.layer_heads] == [(4, 4), (4, 4), (64, 64)]
    assert trace.attention(0, 2).shape[0] == 64
    replay = compile_replay(trace, ["h2o"], "9").execute(OutputOptions(tmp_path / "r"))
    assert replay.residency(layer=2)["kv_head"].nunique() == 64


def test_a_gate_is_neither_used_nor_trained_where_layers_differ(tmp_path: Path) -> None:
    trace = traced(tmp_path, "mimo_v2_flash", StoreOptions(hidden=True))
    with pytest.raises(ModelError, match="2 or 4 key/value heads"):
        train_on_traces([trace], tmp_path / "gate")
    with pytest.raises(TraceError, match=r"layers of .* differ in their heads\nReplay policies without a gate"):
        compile_replay(trace, ["attention-gate"], "12")


@pytest.mark.parametrize(("name", "layers", "heads"), [("jetmoe", (0, 1, 2), 4), ("qwen3_next", (2,), 2)])
def test_a_loaded_model_has_the_layers_and_heads_of_its_trace(name: str, layers: tuple[int, ...], heads: int) -> None:
    """JetMoE repeats keys before it attends, so that a trace has 4 heads; Qwen3-Next has one layer with attention."""
    settings = tuple(parse_policy(f"a2sf:alpha={alpha}") for alpha in (0.1, 0.9))
    choice = tuple(tuple((layer + head) % 2 for head in range(heads)) for layer in layers)
    plan = EvictionPlan.published(Tuned("tuned.toml", settings, layers, choice))
    model, passage, sink = build.build(name), Passage(TokenSequence(0, 14, 24), torch.arange(5, 29)), Kept()
    evaluate(model, [passage], runs_of([plan], [Budget.parse(7)], loop="closed"), [], Prefill.full, sink)
    assert {layer: found.heads for (_, layer), found in sink.intervals.items()} == dict.fromkeys(layers, heads)
    other = replace(plan, policy=Tuned("tuned.toml", settings, layers, ((0, 1, 1),) * len(layers)))
    with pytest.raises(UsageError, match=f"was tuned not for {heads} key/value heads"):
        evaluate(model, [passage], runs_of([other], [Budget.parse(7)], loop="closed"), [], Prefill.full, sink)

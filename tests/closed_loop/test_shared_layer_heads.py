"""Layers that differ in their heads, of which some read the cache of an earlier one (Gemma 4), in both loops."""

import json
from pathlib import Path

import numpy as np
import pytest

from kvscope.closed_loop.compile import compile_verify
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
from kvscope.model.compile import compile_recording
from kvscope.replay import footprint
from kvscope.replay.compile import compile_replay
from kvscope.replay.rescore import compile_score
from kvscope.report.page import page_data, report_input
from kvscope.trace.layer_records import LayerHeads
from kvscope.trace.reader import Trace
from tests.models import build

PROMPT = " ".join(f"w{(7 * number) % 101 + 3}" for number in range(24))
TYPES = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
OWNERS, READERS = [0, 1, 2], {3: 2, 4: 1}
SLIDING = LayerHeads(4, 2, 8)
FULL = {"fewer": LayerHeads(4, 1, 16), "larger": LayerHeads(4, 2, 16)}  # heads of the layers without a window
# The larger Gemma 4 models have fewer key/value heads in full layers; in the smaller ones only the head size differs.
CHANGES = {
    "fewer": {"num_global_key_value_heads": 1, "attention_k_eq_v": True, "global_head_dim": 16},
    "larger": {"global_head_dim": 16},
}


@pytest.fixture(scope="module", params=CHANGES)
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp(request.param)
    config = build.config_of("gemma4_text")
    known = {field: value for field, value in config.to_dict().items() if field != "per_layer_config"}
    shared = {"num_hidden_layers": 5, "layer_types": TYPES, "num_kv_shared_layers": 2}
    changed = type(config)(**{**known, **shared, **CHANGES[request.param]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "config_of", lambda _: changed)
        model = build.saved(folder / "model", "gemma4_text")
    (folder / "prompt.txt").write_text(PROMPT)
    output, text = OutputOptions(folder / request.param), TextOptions(max_new_tokens=12)
    store = StoreOptions("maps+vectors")
    return compile_recording(ModelSource(str(model)), [folder / "prompt.txt"], output, text=text, store=store).execute()


def test_the_trace_names_heads_and_owners(trace: Trace) -> None:
    full = FULL[trace.name]
    assert trace.header.layer_heads == [SLIDING, full, SLIDING, SLIDING, full]
    assert trace.header.shared_cache == {str(reader): owner for reader, owner in READERS.items()}
    assert trace.header.sliding_window == [8, None, 8, 8, None]
    for reader, owner in READERS.items():
        for mine, its in zip(trace.states(0, reader)[1:], trace.states(0, owner)[1:], strict=True):
            assert np.array_equal(mine, its)


@pytest.mark.parametrize("allocate", [None, "pyramid", "cake"])
def test_one_decision_holds_in_both_loops(trace: Trace, tmp_path: Path, allocate: str | None) -> None:
    options = ReplayOptions(plan=PlanOptions(allocate=allocate), closed=ClosedLoopOptions())
    policies = ["h2o", "tova", "keydiff", "random"]
    made = compile_replay(trace, policies, "12", options).execute(OutputOptions(tmp_path / "replay"))
    kv_heads = {layer: trace.heads_of(layer).kv_heads for layer in OWNERS}
    prompt = trace.sequences[0].prompt
    for run in made.summary.runs:
        held = {layer: made.resident(run.run, 0, layer) for layer in trace.layers}
        for reader, owner in READERS.items():
            assert np.array_equal(held[reader], held[owner]), f"{run.title}: layer {reader}"
        alike = run.scope == "layer" and len(set(kv_heads.values())) == 1  # then a layer counts as one
        total = 12 * (len(OWNERS) if alike else sum(kv_heads.values()))
        assert run.uniform_keys == total
        assert total - max(kv_heads.values()) < (run.allocated_keys or 0) <= total
        once = np.mean([held[layer][:, prompt:].sum(-1).mean() for layer in OWNERS])
        assert run.mean("held_keys") == pytest.approx(float(once), rel=1e-6)
        frame = made.fidelity(run.run)
        for layer in trace.layers:
            assert sorted(frame.loc[frame["layer"] == layer, "head"].unique()) == list(range(4))
    assert made.info.trace.shared_cache == {str(reader): owner for reader, owner in READERS.items()}
    json.dumps(page_data(report_input([made], {trace.identity: trace})), allow_nan=False)


def test_groups_of_few_layers_and_a_rescore_agree(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policies = ["h2o", "ada-kv", "cake", "belady", "quest:page_size=2", "ideal", "vatp"]
    whole = compile_replay(trace, policies, "12").execute(OutputOptions(tmp_path / "whole"))
    again = compile_score(whole, trace).execute(OutputOptions(tmp_path / "again"))
    for name in ("retained_mass", "held_keys", "output_error"):
        means = [[run.mean(name) for run in made.summary.runs] for made in (whole, again)]
        assert means[0] == pytest.approx(means[1], rel=1e-6), name
    monkeypatch.setattr(footprint, "GROUP_BYTES", 1)
    parts = compile_replay(trace, policies, "12").execute(OutputOptions(tmp_path / "parts"))
    for one, other in zip(whole.info.runs, parts.info.runs, strict=True):
        assert one.decisions == other.decisions, one.title


@pytest.mark.parametrize("positions", list(Positions))
@pytest.mark.parametrize("prefill", list(Prefill))
def test_real_decoding_agrees_with_the_closed_loop(trace: Trace, prefill: Prefill, positions: Positions) -> None:
    options = VerifyOptions(closed=ClosedLoopOptions(positions=positions), prefill=prefill)
    policies = ["h2o", "tova", "streaming-llm:sinks=2", "keydiff", *(["snapkv"] if prefill == "full" else [])]
    for verdict in compile_verify(trace, policies, "9", options).execute():
        assert verdict.agrees, verdict
        owned = sum(trace.heads_of(layer).kv_heads for layer in OWNERS)
        assert verdict.decisions == owned * trace.sequences[0].length


@pytest.mark.parametrize("allocate", ["pyramid", "cake", "ada"])
def test_real_decoding_shares_a_budget_as_the_closed_loop_does(trace: Trace, allocate: str) -> None:
    options = VerifyOptions(plan=PlanOptions(allocate=allocate))
    assert all(one.agrees for one in compile_verify(trace, ["h2o", "a2sf"], "12", options).execute())

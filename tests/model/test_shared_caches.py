"""Layers that read the cache of an earlier one (Gemma 3n): one decision, by the owner's rows, holds for all of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3nTextConfig

from kvscope.closed_loop.compile import compile_verify
from kvscope.core.errors import TraceError
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
from kvscope.model.selfcheck import layer_caches, self_check
from kvscope.replay import footprint
from kvscope.replay.compile import compile_replay
from kvscope.report.page import page_data
from kvscope.report.panels.depth import depth
from kvscope.report.source import ReportInput
from kvscope.results.store import open_replay
from kvscope.trace.reader import Trace
from kvscope.trace.shared_caches import caches_of
from tests.models import build as builder

PROMPT = " ".join(f"w{(7 * number) % 101 + 3}" for number in range(20))
OWNERS, READERS = [0, 1, 2], {3: 1, 4: 2}


def sharing(name: str) -> Any:
    """Return a configuration of five layers, of which the last two read the cache of the last before them."""
    config = builder.shrunk(builder.CONFIG_MAPPING[name]())
    changed = {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 5,
        "layer_types": [
            "sliding_attention",
            "full_attention",
            "sliding_attention",
            "full_attention",
            "sliding_attention",
        ],
        "activation_sparsity_pattern": [0.0] * 5,
        "intermediate_size": [48] * 5,
    }
    return Gemma3nTextConfig(**{**config.to_dict(), **changed})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "config_of", sharing)
        return builder.saved(tmp_path_factory.mktemp("gemma3n") / "model", "gemma3n_text")


def recorded(folder: Path, place: Path, layers: tuple[int, ...] | None = None) -> Trace:
    place.mkdir(parents=True, exist_ok=True)
    (place / "prompt.txt").write_text(PROMPT)
    store = StoreOptions(store="maps+vectors", layers=layers)
    return compile_recording(
        ModelSource(str(folder)),
        [place / "prompt.txt"],
        OutputOptions(place / "trace"),
        text=TextOptions(max_new_tokens=12),
        store=store,
    ).execute()


@pytest.fixture(scope="module")
def trace(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    return recorded(folder, tmp_path_factory.mktemp("shared"))


def test_the_trace_says_which_layers_share(folder: Path, trace: Trace) -> None:
    assert trace.header.shared_cache == {str(reader): owner for reader, owner in READERS.items()}
    assert caches_of(trace.header) == {0: [0], 1: [1, 3], 2: [2, 4]}
    assert any(line.startswith("Shared caches: layers 3, 4 read") for line in trace.approximate)
    with torch.inference_mode():
        assert (
            layer_caches(AutoModelForCausalLM.from_pretrained(folder).eval(), torch.arange(3, 20)[None]).shared
            == READERS
        )


@pytest.mark.parametrize("allocate", [None, "pyramid", "cake"])
def test_one_decision_holds_for_all_that_read_a_cache(trace: Trace, tmp_path: Path, allocate: str | None) -> None:
    """In both loops alike; what the owner's rows decide is what they decide without readers; keys are counted once."""
    options = ReplayOptions(plan=PlanOptions(allocate=allocate), closed=ClosedLoopOptions())
    policies = ["h2o", "tova", "keydiff", "random"]
    made = compile_replay(trace, policies, "9", options).execute(OutputOptions(tmp_path / "replay"))
    for run in made.info.runs:
        held = {layer: made.resident(run.run, 0, layer) for layer in trace.layers}
        for reader, owner in READERS.items():
            assert np.array_equal(held[reader], held[owner]), f"{run.title}: layer {reader}"
        heads = 1 if run.scope == "layer" else trace.kv_heads
        assert run.allocated_keys == run.uniform_keys == 9 * heads * len(OWNERS), run.title


def test_keys_held_are_counted_once_for_a_cache(trace: Trace, tmp_path: Path) -> None:
    """The budget of 9 keys is held three times; a mean over five layers would count two caches twice."""
    options = ReplayOptions(plan=PlanOptions(allocate="pyramid"), closed=ClosedLoopOptions())
    made = compile_replay(trace, ["h2o"], "9", options).execute(OutputOptions(tmp_path / "replay"))
    assert made.info.trace.shared_cache == {str(reader): owner for reader, owner in READERS.items()}
    assert open_replay(made.path).info.trace.shared_cache == made.info.trace.shared_cache
    prompt = trace.sequences[0].prompt
    for run in made.summary.runs:
        held = {layer: made.resident(run.run, 0, layer)[:, prompt:].sum(-1).mean() for layer in trace.layers}
        once = float(np.mean([held[layer] for layer in OWNERS]))
        assert run.mean("held_keys") == pytest.approx(once, rel=1e-6)
        assert abs(once - float(np.mean(list(held.values())))) > 0.05, "otherwise nothing is shown"
        frame = made.fidelity(run.run)
        assert frame[frame["layer"].isin(READERS)]["held_keys"].isna().all()
        assert frame[frame["layer"].isin(OWNERS)]["held_keys"].notna().all()
        assert frame[frame["layer"] == 3]["read_keys"].notna().all()
    source = ReportInput((made,), {trace.identity: trace})
    drawn = depth(source)
    assert drawn is not None
    for line in drawn["lines"]:
        assert [line["mean"][reader] for reader in READERS] == [line["mean"][owner] for owner in READERS.values()]
    json.dumps(page_data(source), allow_nan=False)


def test_a_record_without_its_owner_is_damaged(trace: Trace, tmp_path: Path) -> None:
    made = compile_replay(trace, ["h2o"], "9").execute(OutputOptions(tmp_path / "replay"))
    with pytest.raises(ValueError, match="one that itself reads another"):
        replace(made.info.trace, shared_cache={"3": 4, "4": 2})


def test_readers_are_scored_with_their_own_rows(trace: Trace, tmp_path: Path) -> None:
    made = compile_replay(trace, ["h2o"], "9").execute(OutputOptions(tmp_path / "replay"))
    frame = made.fidelity(0)
    sequence = trace.sequences[0]
    for layer in (1, 3, 4):
        rows = trace.attention(0, layer)
        visible = made.resident(0, 0, layer)
        of_layer = frame[(frame["layer"] == layer) & (frame["head"] == 0)].set_index("step")["retained_mass"]
        for t in range(sequence.prompt, sequence.length):
            seen = visible[0, t - 1, : t + 1].copy()
            seen[t] = True
            if np.isnan(of_layer[t]):  # nothing is evicted from within the window
                assert layer == 4
                continue
            assert of_layer[t] == pytest.approx(float(rows[0, t, : t + 1][seen].sum()), abs=2e-3), (layer, t)


def test_groups_of_few_layers_decide_the_same(trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies = ["h2o", "belady", "quest:page_size=2", "ideal", "r-kv"]
    whole = compile_replay(trace, policies, "9").execute(OutputOptions(tmp_path / "whole"))
    monkeypatch.setattr(footprint, "GROUP_BYTES", 1)
    job = compile_replay(trace, policies, "9")
    assert job.footprint.layers == 2
    parts = job.execute(OutputOptions(tmp_path / "parts"))
    for one, other in zip(whole.info.runs, parts.info.runs, strict=True):
        assert one.decisions == other.decisions
    reading = next(run.run for run in whole.info.runs if run.policy == "ideal")
    assert not np.array_equal(whole.resident(reading, 0, 1), whole.resident(reading, 0, 3)), "nothing is evicted"


@pytest.mark.slow
@pytest.mark.parametrize("positions", [Positions.original, Positions.compacted])
@pytest.mark.parametrize("prefill", [Prefill.full, Prefill.stream])
def test_decoding_agrees_with_the_closed_loop(trace: Trace, prefill: Prefill, positions: Positions) -> None:
    """A cache that is really shortened is read by every layer that shares it."""
    options = VerifyOptions(closed=ClosedLoopOptions(positions=positions), prefill=prefill)
    policies = ["h2o", "tova", "streaming-llm:sinks=2", "keydiff", *(["snapkv"] if prefill == "full" else [])]
    for verdict in compile_verify(trace, policies, "9", options).execute():
        assert verdict.agrees, verdict
        length = trace.sequences[0].length
        assert verdict.decisions == trace.kv_heads * len(OWNERS) * length
        assert verdict.largest_cache <= (length if verdict.label == "snapkv" else 9)  # it evicts once


def test_a_trace_without_the_owner_says_what_to_record(folder: Path, tmp_path: Path) -> None:
    trace = recorded(folder, tmp_path, (0, 3))
    with pytest.raises(TraceError, match=r"lacks layers 1, whose caches other layers read\n.*--layers 0,1,3"):
        compile_replay(trace, ["h2o"], "9")
    again = recorded(folder, tmp_path / "again", (0, 1, 3))
    made = compile_replay(again, ["h2o"], "9").execute(OutputOptions(tmp_path / "replay"))
    assert np.array_equal(made.resident(0, 0, 1), made.resident(0, 0, 3))


@pytest.mark.parametrize("name", ["gemma3n_text", "llama", "gpt2", "phi3", "deepseek_v3"])
def test_layers_of_their_own_are_not_said_to_share(name: str) -> None:
    with torch.inference_mode():
        assert self_check(builder.build(name), torch.arange(3, 27)[None]).shared == {}

"""Rows of models with attention code of their own, as their modules return them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvscope.core.errors import ModelError, TraceError
from kvscope.core.options import ClosedLoopOptions, ModelSource, OutputOptions, ReplayOptions
from kvscope.core.recording_options import BlockOptions, StoreOptions, TextOptions
from kvscope.model.compile import compile_recording
from kvscope.model.loading import load
from kvscope.model.module_maps import observe_modules, self_check_modules, sources
from kvscope.replay.compile import compile_replay
from kvscope.trace.reader import Trace
from tests.model.tiny import tokens
from tests.models.build import build, saved

PROMPT = "w3 w1 w4 w1 w5 w9 w2 w6 w5 w3 w5"


@pytest.fixture(scope="module", params=["bloom", "falcon"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("own") / request.param, request.param)


def record(source: Any, output: Path, **store: Any) -> Trace:
    prompt = output.with_suffix(".txt")
    prompt.write_text(PROMPT)
    return compile_recording(
        ModelSource(source),
        [prompt],
        OutputOptions(output),
        text=TextOptions(max_new_tokens=5),
        store=StoreOptions(**store),
        blocks=BlockOptions(query_block=4),
    ).execute()


@pytest.mark.parametrize(("stride", "heads"), [(1, None), (3, (0, 1))])
def test_rows_are_those_that_the_model_returns(
    folder: Path, tmp_path: Path, stride: int, heads: tuple[int, ...] | None
) -> None:
    heads = (0, 1, 2, 3) if heads is None or folder.name == "falcon" else heads  # falcon's heads share keys
    trace = record(str(folder), tmp_path / "trace", query_stride=stride, heads=heads)
    assert trace.header.rows_from == "module" and trace.header.stored == ["maps"]
    model, ids = load(ModelSource(str(folder))).model, torch.tensor(trace.tokens(0)["token_id"].to_numpy())[None]
    maps = model(input_ids=ids, use_cache=False, output_attentions=True).attentions
    for layer in trace.layers:
        for t in range(stride - 1, ids.shape[1], stride):
            row = trace.attention(0, layer, t, t + 1)[:, 0, : t + 1]
            assert np.allclose(row, maps[layer][0, list(heads), t, : t + 1].detach(), rtol=2**-11, atol=1e-6)


def test_the_rows_of_a_layer_are_freed_when_they_are_written() -> None:
    model, ids, seen = build("mpt"), tokens(9), []
    found = sources(model, ids)
    with observe_modules(found, lambda layer, rows: seen.append((layer, tuple(rows.shape)))):
        output = model(input_ids=ids, use_cache=False, output_attentions=True)
    assert seen == [(layer, (1, 4, 9, 9)) for layer in range(3)]
    assert [rows.numel() for rows in output.attentions] == [0, 0, 0]
    again = model(input_ids=ids, use_cache=False, output_attentions=True)
    assert torch.equal(again.logits, output.logits), "observing changes nothing"
    assert all(rows.numel() for rows in again.attentions), "and leaves nothing behind"


def test_the_open_loop_replays_what_needs_rows_alone(folder: Path, tmp_path: Path) -> None:
    trace = record(str(folder), tmp_path / "trace")
    made = compile_replay(trace, ["h2o", "tova"], "5").execute(OutputOptions(tmp_path / "replay"))
    assert {run.policy for run in made.info.runs} >= {"h2o", "tova"}
    with pytest.raises(TraceError, match=r"needs value_l1, .*\nUse what needs rows alone, such as h2o"):
        compile_replay(trace, ["vatp"], "5")
    with pytest.raises(TraceError, match=r"policies cannot run inside its attention\n.*without --perplexity"):
        compile_replay(trace, ["h2o"], "5", ReplayOptions(closed=ClosedLoopOptions()))


@pytest.mark.parametrize("store", [{"store": "qkv"}, {"hidden": True}])
def test_other_stores_are_refused(folder: Path, tmp_path: Path, store: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"code of its own, so only the rows .*\n.*--store maps, without --hidden"):
        record(str(folder), tmp_path / "trace", **store)


def test_a_model_that_looks_at_later_tokens_has_no_rows() -> None:
    with pytest.raises(ModelError, match=r"XLMWithLMHeadModel .* return no causal rows for each layer\n"):
        self_check_modules(build("xlm"), tokens(9))


def test_key_value_heads_may_be_named_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mpt")
    monkeypatch.setattr(model.config, "num_kv_heads", [1, 2, 4], raising=False)
    sizes = self_check_modules(model, tokens(9)).sizes
    assert [(sizes[layer].heads, sizes[layer].kv_heads) for layer in range(3)] == [(4, 1), (4, 2), (4, 4)]
    monkeypatch.setattr(model.config, "num_kv_heads", [1, 3, 4], raising=False)
    with pytest.raises(ModelError, match=r"4 query heads of layer 1 of MptForCausalLM do not share the 3 "):
        self_check_modules(model, tokens(9))


def test_a_learned_index_is_in_the_rows() -> None:
    """The mask of the index is part of what the module returns: a query reads at most as many keys as it chooses."""
    model, rows = build("deepseek_v32"), {}
    model.set_attn_implementation("eager")
    ids = tokens(20)
    with observe_modules(sources(model, ids), lambda layer, part: rows.update({layer: part})):
        model(input_ids=ids, use_cache=False, output_attentions=True)
    chosen = model.config.index_topk
    assert all(int((part > 0).sum(-1).max()) == chosen < 20 for part in rows.values())

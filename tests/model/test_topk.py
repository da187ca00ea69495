"""Store topk and sampling, recorded from models: what is stored is what a trace of all rows has."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kvscope.core.errors import TraceError, UsageError
from kvscope.model import recorder as recorder_module
from kvscope.model.attention_hook import observe_attention
from kvscope.model.generate import trace
from kvscope.model.pipeline import Pipeline
from kvscope.model.plan import RecordingPlan
from kvscope.model.recorder import HELD_STEPS, Recorder
from kvscope.trace import stretches as stretches_module
from kvscope.trace.columns import layer_file
from kvscope.trace.files import TraceFiles
from kvscope.trace.parquet import LayerFile
from kvscope.trace.schema import parse_store
from tests.model.test_hook import Collector
from tests.model.tiny import build, saved, tokens

PROMPT, NEW = 11, HELD_STEPS + 8
KEPT = ["llama", "gemma2", "gpt_oss", "mistral"]  # plain, capped, with learned sinks, all windows


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches_module, "STRETCH", 8)
    monkeypatch.setattr(recorder_module, "STRETCH", 8)


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    file = tmp_path / "prompt.txt"
    file.write_text(" ".join(f"w{1 + index * 7 % 60}" for index in range(PROMPT)))
    return file


@pytest.mark.parametrize("name", KEPT)
def test_what_is_stored_is_of_the_rows(name: str, prompt: Path, tmp_path: Path) -> None:
    folder, options = str(saved(tmp_path / name, name)), {"max_new_tokens": NEW, "query_block": 5}
    maps = trace(folder, [prompt], output=tmp_path / "maps", store="maps", **options)
    some = trace(folder, [prompt], output=tmp_path / "some", store="topk:4", **options)
    every = trace(folder, [prompt], output=tmp_path / "every", store="topk:99", **options)
    length = maps.sequences[0].length
    for layer in (0, 1):
        rows, residual = maps.attention(0, layer), some.residuals(0, layer)
        assert np.array_equal(every.attention(0, layer), rows), "with room for every key nothing is lost"
        assert np.allclose(every.row_sums(0, layer), maps.row_sums(0, layer), atol=1e-6)
        got, top = some.attention(0, layer), some._rebuilt.top(0, layer, 0, length)
        assert np.array_equal(rows[top.head, top.query, top.key], top.weight)
        assert np.array_equal(got[top.head, top.query, top.key], top.weight)
        left = rows.copy()
        left[top.head, top.query, top.key] = 0
        assert np.allclose(left.sum(-1), residual, atol=2e-3), "the residual is what is not stored"
        assert (left.max(-1) <= top.least).all(), "and none of that is heavier"
        for name_, kind in (("sums", rows), ("outside", left)):
            table = (
                TraceFiles(some.path, some.record)
                .of_sequence(layer_file("columns", layer), 0, ["head", "position", name_])
                .to_pylist()
            )
            start = 0
            for stop in stretches_module.stretches(PROMPT, length):
                found = [row[name_] for row in table if row["position"] == stop - 1]
                assert np.allclose(found, kind[:, start:stop, :stop].sum(1), atol=2e-3)
                start = stop
        assert np.array_equal(some.key_norms(0, layer), maps.key_norms(0, layer))
        assert np.array_equal(some.mean_queries(0, layer), maps.mean_queries(0, layer))


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_logit_is_the_logarithm_of_its_weight_and_the_sum(name: str, prompt: Path, tmp_path: Path) -> None:
    folder = str(saved(tmp_path / name, name))
    some = trace(folder, [prompt], output=tmp_path / "some", max_new_tokens=NEW, store="topk:4")
    qkv = trace(folder, [prompt], output=tmp_path / "qkv", max_new_tokens=NEW, store="qkv")
    states = qkv.states(0, 1)
    key = states.keys.repeat(some.heads // some.kv_heads, 0)
    logits = states.queries @ key.swapaxes(1, 2) * qkv.header.attention_of(1).scaling
    top = some._rebuilt.top(0, 1, 0, some.sequences[0].length)
    sums = some._stored.of_rows("log_sum_exp", 0, 1)
    made = np.log(top.weight) + sums[top.head, top.query]
    heavy = top.weight > 1e-3
    assert np.allclose(made[heavy], logits[top.head, top.query, top.key][heavy], atol=2e-3)


@pytest.mark.parametrize(
    ("store", "said"), [("topk:0", "not a number"), ("topk:x", "not a number"), ("maps:4", "unknown")]
)
def test_a_store_that_is_none(store: str, said: str, prompt: Path) -> None:
    with pytest.raises(UsageError, match=said):
        trace("no/model", [prompt], store=store)
    assert parse_store("topk") == ("topk", 256)


@pytest.mark.parametrize("store", ["maps", "maps+vectors", "qkv", "topk:4"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_some_heads_are_those_of_all(name: str, store: str, prompt: Path, tmp_path: Path) -> None:
    folder, options = str(saved(tmp_path / name, name)), {"max_new_tokens": NEW, "store": store}
    whole = trace(folder, [prompt], output=tmp_path / "whole", **options)
    part = trace(folder, [prompt], output=tmp_path / "part", heads=[2, 3], **options)
    assert (part.heads, part.kv_heads, part.header.head_numbers, part.header.n_heads) == (2, 1, [2, 3], 4)
    assert part.approximate[-1] == "Sampled: of the model's 4 query heads 2, 3 were recorded, numbered here from 0."
    assert np.allclose(part.attention(0, 1), whole.attention(0, 1)[2:], atol=1e-6)
    assert np.allclose(part.value_norms(0, 1), whole.value_norms(0, 1)[1:], atol=1e-6)
    if store == "qkv":
        assert "queries" not in part.stored, "their mean is over all heads"
    else:
        assert np.array_equal(part.mean_queries(0, 1), whole.mean_queries(0, 1))


def test_heads_that_cannot_be_recorded(prompt: Path, tmp_path: Path) -> None:
    folder = str(saved(tmp_path / "llama"))
    with pytest.raises(UsageError, match="heads 1,2 split a group of 2") as caught:
        trace(folder, [prompt], output=tmp_path / "t", heads=[2, 1], max_new_tokens=1)
    assert "--heads 0,1,2,3" in caught.value.todo
    with pytest.raises(UsageError, match="no query head 4"):
        trace(folder, [prompt], output=tmp_path / "t", heads=[4], max_new_tokens=1)
    every = trace(folder, [prompt], output=tmp_path / "t", heads=[0, 1, 2, 3], max_new_tokens=1)
    assert every.header.head_numbers == []


@pytest.mark.parametrize("stride", [2, 3, 50])
def test_every_nth_row(stride: int, prompt: Path, tmp_path: Path) -> None:
    folder, plans = str(saved(tmp_path / "llama")), list[RecordingPlan]()
    options = {"max_new_tokens": NEW, "query_block": 4, "announce": plans.append}
    whole = trace(folder, [prompt], output=tmp_path / "whole", **options)
    part = trace(folder, [prompt], output=tmp_path / "part", query_stride=stride, **options)
    length, rows = whole.sequences[0].length, whole.attention(0, 1)
    assert part.positions(0).tolist() == list(range(stride - 1, length, stride))
    for t in part.positions(0):
        assert np.array_equal(part.attention(0, 1, t, t + 1)[:, 0], rows[:, t, : t + 1])
    assert np.array_equal(part.similarity(0, 1), whole.similarity(0, 1)), "keys are all there"
    assert np.isnan(part.row_sums(0, 1)).sum() == 4 * (length - len(part.positions(0)))
    with pytest.raises(TraceError, match=f"every {stride}th row"):
        part.attention(0, 1, stride - 1, stride + 1)
    assert plans[1].bytes < plans[0].bytes
    assert "every" in part.approximate[0]
    with pytest.raises(UsageError, match="cannot record every n-th row only"):
        trace(folder, [prompt], store="qkv", query_stride=2)


@torch.inference_mode()
def test_blocks_are_cut_so_that_what_waits_stays_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limit, ids, model = 4000, tokens(40), build("llama")
    monkeypatch.setattr(recorder_module, "BLOCK", limit // 4)
    collectors = [Collector(), Collector()]
    with Pipeline(limit=limit) as pipeline:
        for collector, own in zip(collectors, (pipeline, None), strict=True):
            recorder = Recorder(collector, [0, 1], pipeline=own)
            recorder.begin(0)
            with observe_attention(model, recorder):
                model(input_ids=ids)
            recorder.end()
    assert 0 < pipeline.peak <= limit, "uncut, one block alone is above the limit"
    piped, plain = (collector.rows for collector in collectors)
    assert piped.keys() == plain.keys() == {(layer, t) for layer in (0, 1) for t in range(40)}
    assert all(torch.equal(piped[place], plain[place]) for place in plain)


def test_a_disk_that_fills_up_while_it_records(prompt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is raised in a thread of the pipeline."""
    folder, add, count = str(saved(tmp_path / "llama")), LayerFile.add, [0]

    def full(self, columns) -> None:
        count[0] += 1
        if count[0] > 5:
            raise OSError(28, "No space left on device")
        add(self, columns)

    monkeypatch.setattr(LayerFile, "add", full)
    with pytest.raises(TraceError, match="is full"):
        trace(folder, [prompt], output=tmp_path / "t", max_new_tokens=NEW)
    assert not list(tmp_path.glob("t*"))


def test_rows_of_the_bundled_model_are_bounded_and_near(tmp_path: Path) -> None:
    """Trained attention: sums of columns, which accumulating policies decide by, are within a few percent."""
    file = tmp_path / "p.txt"
    file.write_text("Alice was beginning to get very tired of sitting by her sister on the bank. " * 3)
    options = {"max_new_tokens": 20, "layers": [1]}
    maps = trace("demo", [file], output=tmp_path / "maps", **options)
    some = trace("demo", [file], output=tmp_path / "some", store="topk:16", **options)
    rows, got, residual = maps.attention(0, 1), some.attention(0, 1), some.residuals(0, 1)
    assert 0.05 < some.storage_error.mean_after_prompt < 0.6
    seen = np.random.default_rng(0).random(rows.shape) < 0.3
    for full in (rows, got):
        retained = (full * seen).sum(-1) / full.sum(-1)
        least = (np.where(got >= np.partition(got, -16)[..., -16:-15], rows, 0) * seen).sum(-1)
        assert (retained >= least - 2e-3).all()
        assert (retained <= least + residual + 2e-3).all()
    length = rows.shape[1]
    for end in stretches_module.stretches(some.sequences[0].prompt, length):
        off = np.abs(got[:, :end].sum(1) - rows[:, :end].sum(1)).sum(-1) / rows[:, :end].sum((1, 2))
        assert off.max() < 0.05

"""Caches of TransformerLens and nnsight themselves, by the code of the documentation; skipped where they are absent."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import kvscope
from kvscope.engine.layers import RecordedLayers

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "kvscope" / "model" / "demo"
HALF = 2**-11  # largest error of a weight of at most one in 16 bit


def run_block(word: str) -> dict:
    """Run the block of docs/record.md that has a word, and return its names. nnsight reads it from a file."""
    (block,) = [block for block in blocks() if word in block]
    eager = AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer("Note: Clara holds 583. The captain looked at the sea.", return_tensors="pt").input_ids
    names = {"kvscope": kvscope, "folder": FOLDER, "eager": eager, "tokenizer": tokenizer, "ids": ids}
    Path("block.py").write_text(block)
    return runpy.run_path("block.py", names)


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "record.md").read_text(), re.DOTALL)


def rows_of(trace: kvscope.Trace) -> np.ndarray:
    """Return the rows of the only sequence of a trace, ``[L, H, T, T]``."""
    (sequence,) = trace.sequences
    return RecordedLayers(trace, sequence, trace.layers, torch.device("cpu")).rows(0, sequence.length).numpy()


def test_a_cache_of_transformer_lens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformer_lens")
    monkeypatch.chdir(tmp_path)
    names = run_block("TransformerBridge")
    trace, cache = names["trace"], names["cache"]
    expected = torch.cat([cache[f"blocks.{layer}.attn.hook_pattern"] for layer in trace.layers]).numpy()
    assert np.abs(rows_of(trace) - expected).max() <= HALF
    assert trace.header.store == "maps+vectors" and trace.header.kv_heads == 4
    assert list(trace.tokens(0)["token_id"]) == names["ids"][0].tolist()


def test_attention_saved_with_nnsight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nnsight")
    monkeypatch.chdir(tmp_path)
    names = run_block("nnsight")
    trace = names["trace"]
    with torch.no_grad():
        expected = torch.cat(names["eager"](names["ids"], output_attentions=True).attentions).numpy()
    assert np.abs(rows_of(trace) - expected).max() <= HALF
    assert trace.header.kv_heads == 4

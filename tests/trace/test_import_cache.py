"""Activation caches in memory: names and shapes of TransformerLens, and layers as saved with nnsight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvscope
from kvscope.core.errors import TraceError, UsageError

LAYERS, HEADS, GROUPS, LENGTH, SIZE = 3, 4, 2, 10, 6


def activations(batch: int = 1, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the cache of a model without rotation, by the names that TransformerLens gives."""
    made = torch.Generator().manual_seed(seed)
    cache: dict[str, torch.Tensor] = {"hook_embed": torch.zeros(batch, LENGTH, 8)}
    for layer in range(LAYERS):
        queries = torch.randn(batch, LENGTH, HEADS, SIZE, generator=made)
        keys, values = (torch.randn(batch, LENGTH, GROUPS, SIZE, generator=made) for _ in range(2))
        every = keys.repeat_interleave(HEADS // GROUPS, 2)
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, every) / SIZE**0.5
        scores = scores.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
        own = {"pattern": scores.softmax(-1), "q": queries, "k": keys, "v": values}
        cache |= {f"blocks.{layer}.attn.hook_{name}": tensor for name, tensor in own.items()}
    return cache


class LikeActivationCache:
    """As TransformerLens's class: no mapping, but with names and items."""

    def __init__(self, cache: dict[str, torch.Tensor]) -> None:
        self.cache_dict = cache

    def keys(self) -> Any:
        return self.cache_dict.keys()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.cache_dict[name]


@dataclass
class Saved:
    """As a proxy of nnsight that has been saved."""

    value: torch.Tensor


def test_a_cache_of_transformer_lens_is_what_its_tensors_are(tmp_path: Path) -> None:
    cache = activations(batch=2)
    trace = kvscope.import_cache(LikeActivationCache(cache), tmp_path / "t", prompt_length=6, tokens=torch.arange(20).view(2, 10))  # fmt: skip  # noqa: E501
    assert (len(trace.sequences), trace.header.heads, trace.header.kv_heads) == (2, HEADS, GROUPS)
    assert trace.header.store == "maps+vectors" and trace.sequences[0].prompt == 6
    for sequence in range(2):
        assert list(trace.tokens(sequence)["token_id"]) == list(range(10 * sequence, 10 * sequence + 10))
        for layer in range(LAYERS):
            for name, kind in {"queries": "q", "keys": "k", "values": "v"}.items():
                expected = cache[f"blocks.{layer}.attn.hook_{kind}"][sequence].transpose(0, 1)
                np.testing.assert_allclose(trace.vectors(sequence, layer, name), expected, rtol=1e-6)
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"][sequence]
            np.testing.assert_allclose(trace.attention(sequence, layer), pattern, atol=1e-3)
    replayed = kvscope.replay(trace, ["h2o", "keydiff"], "4", output=tmp_path / "r")
    assert {"output_error", "retained_mass"} <= set(replayed.summary.runs[0].metrics)


def test_rotated_vectors_are_taken_and_others_are_not_stored(tmp_path: Path) -> None:
    """`hook_q` and `hook_k` are those before the rotation, from which the rows do not follow."""
    cache = activations()
    rotated = dict(cache)
    for layer in range(LAYERS):
        for kind in "qk":
            name = f"blocks.{layer}.attn.hook_{kind}"
            rotated[f"blocks.{layer}.attn.hook_rot_{kind}"] = cache[name]
            rotated[name] = torch.randn(cache[name].shape)
    both = kvscope.import_cache(rotated, tmp_path / "both")
    expected = cache["blocks.1.attn.hook_k"][0].transpose(0, 1)
    np.testing.assert_allclose(both.vectors(0, 1, "keys"), expected, rtol=1e-6)
    before = {name: tensor for name, tensor in rotated.items() if "rot_" not in name}
    trace = kvscope.import_cache(before, tmp_path / "before")
    assert "vectors:values" in trace.header.stored and "vectors:keys" not in trace.header.stored
    assert any("keys and queries are not stored" in line and "hook_rot_q" in line for line in trace.header.assumed)


@pytest.mark.parametrize("name", ["{}", "model.layers.{}.self_attn", "transformer.h.{}.attn"])
def test_layers_as_saved_with_nnsight(name: str, tmp_path: Path) -> None:
    cache = activations()
    saved = {name.format(layer): Saved(cache[f"blocks.{layer}.attn.hook_pattern"].bfloat16().float()) for layer in range(LAYERS)}  # fmt: skip  # noqa: E501
    trace = kvscope.import_cache(saved, tmp_path / "t", kv_heads=2, prompt_length=5)
    assert (trace.layers, trace.header.store, trace.header.kv_heads) == ([0, 1, 2], "maps", 2)
    np.testing.assert_allclose(trace.attention(0, 2), cache["blocks.2.attn.hook_pattern"][0], atol=5e-3)
    part = kvscope.import_cache({7: saved[name.format(2)], 3: saved[name.format(0)]}, tmp_path / "part")
    assert part.header.assumed[0] == "layers [3, 7] of the cache are numbered from 0"
    np.testing.assert_allclose(part.attention(0, 1), trace.attention(0, 2), atol=1e-6)


def test_padding_is_removed(tmp_path: Path) -> None:
    pattern = activations()["blocks.0.attn.hook_pattern"].clone()
    pattern[..., :2] = 0
    pattern = pattern / pattern.sum(-1, keepdim=True).clamp(min=1e-9)
    mask = torch.tensor([[0, 0, *[1] * 8]])
    assert [one.length for one in kvscope.import_cache({0: pattern}, tmp_path / "t", attention_mask=mask).sequences] == [8]  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    ("cache", "what"),
    [
        ({}, "the cache is empty"),
        ({"blocks.0.attn.hook_q": torch.zeros(1, 4, 2, 3)}, "no hook_pattern"),
        ({"embed": torch.zeros(1)}, "'embed' in the cache is not a layer"),
        ({"a.1": torch.zeros(1), "b.1": torch.zeros(1)}, "layer 1 twice"),
        ({0: torch.zeros(4, 4)}, "layer 0 has the shape [4, 4]"),
        (activations() | {"blocks.9.attn.hook_v": torch.zeros(1, LENGTH, 2, 3)}, "values of layers [0, 1, 2, 9]"),
    ],
)
def test_what_is_no_cache(cache: dict[Any, torch.Tensor], what: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as found:
        kvscope.import_cache(cache, tmp_path / "t")
    assert what in found.value.what and found.value.todo
    assert not (tmp_path / "t").exists()


def test_rows_are_checked(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="sum"):
        kvscope.import_cache({0: activations()["blocks.0.attn.hook_pattern"] / 2}, tmp_path / "t")

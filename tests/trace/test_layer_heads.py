"""Reading traces whose layers differ in their heads, and refusing those whose header is wrong about a layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvscope.core.errors import TraceError
from kvscope.core.json import JsonDict
from kvscope.trace.layer_records import LayerHeads, heads_text
from kvscope.trace.reader import open_trace
from kvscope.trace.record_file import to_json
from kvscope.trace.space import estimate_bytes, estimate_layers
from tests.trace.layers import HEADS, LENGTH, record, rows_of, vectors_of
from tests.trace.make import change_header
from tests.trace.make import record as record_alike


@pytest.mark.parametrize("store", ["maps+vectors", "qkv"])
def test_every_layer_is_read_with_its_own_heads(tmp_path: Path, store: str) -> None:
    trace = record(tmp_path / "t", store=store)
    assert (trace.heads, trace.kv_heads, trace.head_dim) == (6, 4, 5), "older fields have the most of any layer"
    for layer, own in enumerate(HEADS):
        vectors, states = vectors_of(layer), trace.states(0, layer)
        assert all(np.array_equal(getattr(states, name), given) for name, given in vectors.items())
        assert trace.mean_queries(0, layer).shape == (LENGTH, own.head_dim)
        assert np.allclose(trace.value_norms(0, layer, "l1"), np.abs(vectors["values"]).sum(-1), rtol=1e-6)
        assert trace.similarity(0, layer).shape == (own.kv_heads, LENGTH, LENGTH)
        assert trace.row_sums(0, layer).shape == (own.heads, LENGTH)
        rows = trace.attention(0, layer)
        if store == "maps+vectors":
            assert np.array_equal(rows, rows_of(layer).astype(np.float16).astype(np.float32))
            continue
        keys = vectors["keys"].astype(np.float64).repeat(own.heads // own.kv_heads, 0)
        logits = 0.7 * vectors["queries"].astype(np.float64) @ keys.transpose(0, 2, 1)
        weights = np.exp(logits - logits.max(-1, keepdims=True)) * np.tri(LENGTH)
        assert np.allclose(rows, weights / weights.sum(-1, keepdims=True), atol=1e-6)


def test_values_of_all_layers_may_have_another_size(tmp_path: Path) -> None:
    trace = record(tmp_path / "t", [5])
    assert (trace.header.value_dim, trace.header.layer_heads) == (2, [])
    assert trace.states(0, 5).values.shape == (4, LENGTH, 2)


def test_a_trace_whose_layers_are_alike_says_nothing_of_single_layers(tmp_path: Path) -> None:
    record_alike(tmp_path / "t", lengths=[6])
    trace = open_trace(tmp_path / "t")
    assert not {"layer_heads", "value_dim"} & to_json(trace.record).keys()
    assert trace.heads_of(2) == LayerHeads(2, 2, 3)


def _layer(number: int, **changes: int) -> JsonDict:
    given = [{"heads": own.heads, "kv_heads": own.kv_heads, "head_dim": own.head_dim} for own in HEADS]
    given[5]["value_dim"] = 2
    given[number].update(changes)
    return {"layer_heads": given}


WRONG = {
    "not shared": (_layer(1, kv_heads=4), "layer_heads of layer 1 4 do not share 6 query heads evenly"),
    "more than the header says": (_layer(0, heads=8), "layer_heads the most heads of a layer are 8, not 6"),
    "one is missing": ({"layer_heads": [{"heads": 6, "kv_heads": 4, "head_dim": 5}]}, "it has 1 entries for 6 layers"),
    "none": (_layer(2, heads=0), "layer_heads"),
    "too few rows": (_layer(1, heads=3), "by its metadata it is the file of another trace"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_heads_of_a_layer_are_refused_in_two_lines(tmp_path: Path, what: str) -> None:
    record(tmp_path / "t")
    changes, said = WRONG[what]
    change_header(tmp_path / "t", changes)
    with pytest.raises(TraceError) as raised:
        open_trace(tmp_path / "t").attention(0, 1)
    assert raised.value.what.startswith(f"trace {tmp_path / 't'} is damaged")
    assert all(word in raised.value.what for word in said.split())
    assert len(str(raised.value).splitlines()) == 2


def test_rows_of_another_number_of_heads_are_seen_where_the_file_has_no_digest(tmp_path: Path) -> None:
    record(tmp_path / "t")
    change_header(tmp_path / "t", _layer(1, heads=3), version=5)
    with pytest.raises(TraceError, match=f"{6 * LENGTH} rows instead of {3 * LENGTH}"):
        open_trace(tmp_path / "t").attention(0, 1)


def test_the_estimate_of_a_trace_is_the_sum_over_its_layers() -> None:
    sizes = {"heads": 8, "kv_heads": 4, "head_dim": 64, "lengths": [100, 300]}
    assert estimate_layers([LayerHeads(8, 4, 64)] * 5, lengths=[100, 300]) == estimate_bytes(layers=5, **sizes)
    parts = [estimate_layers([own], lengths=[100], stored=["maps"]) for own in HEADS]
    shared = estimate_layers([], lengths=[100], stored=["maps"])
    assert estimate_layers(HEADS, lengths=[100], stored=["maps"]) == sum(parts) - shared * (len(HEADS) - 1)
    assert parts[1] - shared > parts[0] - shared, "more heads take more"


def test_heads_are_named_once_where_layers_are_alike() -> None:
    assert heads_text({0: HEADS[0], 2: HEADS[2]}) == "4 query heads, 2 key/value heads of size 3"
    assert heads_text({0: HEADS[0], 1: HEADS[1], 2: HEADS[2], 5: HEADS[5]}) == (
        "layers 0, 2: 4 query heads, 2 key/value heads of size 3; layer 1: 6 query heads, 3 key/value heads of size 3; "
        "layer 5: 4 query heads, 4 key/value heads of size 3, values of size 2"
    )

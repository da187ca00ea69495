"""Import of captured maps: rows that are not attention are refused by layer, head and row."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from kvscope.core.errors import KvscopeError, TraceError, UsageError
from kvscope.trace.importer import import_maps
from tests.trace.make import rows_of

LENGTH = 6


def maps(layers: int = 2, heads: int = 4) -> np.ndarray:
    return np.stack([rows_of(layer, heads, LENGTH) for layer in range(layers)])


def saved(folder: Path, **arrays: np.ndarray) -> Path:
    file = folder / "maps.npz"
    np.savez(file, **arrays)
    return file


def test_rows_and_signals_come_back(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    keys, values = random.normal(size=(2, 2, 2, LENGTH, 3)).astype(np.float32)
    queries = random.normal(size=(2, 4, LENGTH, 3)).astype(np.float32)
    file = saved(
        tmp_path,
        attention=maps(),
        keys=keys,
        values=values,
        queries=queries,
        tokens=np.array(["a", "b", "c", "</script>", "e", "f"]),
        prompt_length=np.array(4),
    )
    trace = import_maps(file, "the prompt", tmp_path / "t")
    assert (trace.heads, trace.kv_heads, trace.head_dim) == (4, 2, 3)
    assert trace.sequences[0].prompt == 4
    assert np.allclose(trace.attention(0, 1), maps()[1], atol=5e-4)
    assert np.allclose(trace.value_norms(0, 1, "l1"), np.abs(values[1]).sum(-1))
    assert np.allclose(trace.key_norms(0, 0), np.linalg.norm(keys[0], axis=-1))
    cosine = keys[0, 1, 4] @ keys[0, 1, 2] / np.linalg.norm(keys[0, 1, 4]) / np.linalg.norm(keys[0, 1, 2])
    assert trace.similarity(0, 0)[1, 4, 2] == pytest.approx(cosine, abs=1e-3)
    assert np.allclose(trace.mean_queries(0, 0), queries[0].mean(0))
    assert np.array_equal(trace.vectors(0, 1, "values"), values[1])
    for got, given in zip(trace.states(0, 1), (queries, keys, values), strict=True):
        assert np.array_equal(got, given[1])
    assert trace.tokens(0)["text"].tolist()[3] == "</script>"
    assert trace.header.source == "import"
    assert trace.header.prompts[0].text == "the prompt"


def test_some_vectors_without_the_others(tmp_path: Path) -> None:
    keys = np.random.default_rng(0).normal(size=(2, 2, LENGTH, 3)).astype(np.float16)
    trace = import_maps(saved(tmp_path, attention=maps(), keys=keys), None, tmp_path / "t")
    assert np.array_equal(trace.vectors(0, 0, "keys"), keys[0])
    with pytest.raises(TraceError, match="does not hold vectors:queries"):
        trace.states(0, 0)


def test_several_sequences_and_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "maps.safetensors"
    save_file({"attention": np.stack([maps(), maps()[::-1]])}, file)
    trace = import_maps(file, None, tmp_path / "t", prompt_length=2)
    assert [s.length for s in trace.sequences] == [LENGTH, LENGTH]
    assert np.allclose(trace.attention(1, 0), maps()[1], atol=5e-4)
    assert trace.stored == {"maps"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((1, 2, 3, 5, 0.01), "layer 1, head 2, row 3 attends to a later key"),
        ((0, 1, 4, 2, np.nan), "layer 0, head 1, row 4 has a weight that is not finite"),
        ((0, 1, 4, 2, -0.1), "layer 0, head 1, row 4 has a negative weight"),
        ((1, 0, 5, 0, 2.0), "layer 1, head 0, row 5 sums to more than one"),
        ((1, 0, 0, 0, 0.5), "layer 1, head 0, row 0 sums to less than one"),
    ],
)
def test_what_is_no_attention(tmp_path: Path, change: tuple, message: str) -> None:
    *where, value = change
    attention = maps()
    attention[tuple(where)] = value
    with pytest.raises(TraceError, match=message):
        import_maps(saved(tmp_path, attention=attention), None, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_learned_sinks_may_take_a_share(tmp_path: Path) -> None:
    trace = import_maps(saved(tmp_path, attention=maps() * 0.7), None, tmp_path / "t", learned_sinks=True)
    assert np.allclose(trace.row_sums(0, 0), 0.7, atol=1e-5)
    assert (trace.header.learned_sinks, trace.header.sink_rows) == (True, "after")


def test_rows_before_learned_sinks_are_stored_after_them_where_the_share_is_known(tmp_path: Path) -> None:
    share = np.random.default_rng(0).random((2, 4, LENGTH)).astype(np.float32)
    file = saved(tmp_path, attention=maps(), sink_mass=share)
    trace = import_maps(file, None, tmp_path / "t")
    assert (trace.header.learned_sinks, trace.header.sink_rows) == (True, "after")
    assert np.allclose(trace.attention(0, 1), maps()[1] * (1 - share[1])[..., None], atol=5e-4)
    assert np.allclose(trace.row_sums(0, 1), 1 - share[1], atol=1e-5)
    unknown = import_maps(saved(tmp_path, attention=maps()), None, tmp_path / "u", learned_sinks=True)
    assert (unknown.header.learned_sinks, unknown.header.sink_rows) == (False, "before")
    assert any("before learned sinks" in line for line in unknown.header.assumed)
    assert any(line.startswith("Rows before the sink") for line in unknown.approximate)
    with pytest.raises(TraceError, match="sums to less than one"):
        import_maps(saved(tmp_path, attention=maps() * 0.7, sink_mass=share), None, tmp_path / "v", learned_sinks=True)
    with pytest.raises(UsageError, match="sink_mass contains a share outside 0 to 1"):
        import_maps(saved(tmp_path, attention=maps(), sink_mass=share + 1), None, tmp_path / "v")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"maps": np.zeros(3)}, "no array called attention"),
        ({"attention": np.zeros((2, 3, 3))}, "has the shape"),
        ({"attention": np.zeros((1, 2, 3, 4))}, "has the shape"),
        ({"attention": maps(), "value_l1": np.ones((2, 3, LENGTH))}, "do not share 3 key/value heads"),
        ({"attention": maps(), "keys": np.ones((2, 2, 5, 3))}, "keys has the shape"),
        ({"attention": maps(), "tokens": np.arange(4)}, "tokens has the shape"),
        ({"attention": maps(), "prompt_length": np.array(9)}, "does not fit 6 tokens"),
    ],
)
def test_wrong_shapes(tmp_path: Path, arrays: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        import_maps(saved(tmp_path, **arrays), None, tmp_path / "t")


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        import_maps(tmp_path / "none.npz", None, tmp_path / "t")
    for name in ("bad.npz", "bad.safetensors", "bad.txt"):
        (tmp_path / name).write_text("nothing")
        with pytest.raises(KvscopeError, match=name):
            import_maps(tmp_path / name, None, tmp_path / "t")

"""``trace.json`` comes back as it was written; what no trace can say is refused by the name of its field."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.core.errors import TraceError
from kvscope.core.json_records import described, plain
from kvscope.core.seal import SEAL
from kvscope.trace.layer_records import LayerAttention, RotaryRecord
from kvscope.trace.record import TraceHeader, TraceRecord
from kvscope.trace.record_file import parse_record, read_record, to_json, write_record
from kvscope.trace.schema import HEADER, OLDEST_VERSION, SCHEMA_VERSION, SEALED_SINCE

EXAMPLE = Path(__file__).parents[2] / "traces" / "example"
SINCE = {2: ["attention", "prefill_chunk"], 4: ["top", "head_numbers", "n_heads", "query_stride"], 7: ["vector_dtype"]}


def example() -> dict[str, Any]:
    """Return the content of an example with every optional part."""
    data = json.loads((EXAMPLE / HEADER).read_text())
    attention = [plain(LayerAttention(0.5, 30.0, 4, [0.5])) for _ in data["layers"]]
    model = data["model"] | {"weights": [0.5, 1.0], "sha256": "0", "config": {"id2label": {"0": "x"}, "a": [None, 1]}}
    loss = {"mean": 0.1, "mean_after_prompt": None, "worst": 0.5}
    size = data["head_dim"]
    rotary = [plain(RotaryRecord(data["layers"], [0.5] * size, list(range(size)))) | {"scale": 1.5}]
    more = {"attention": attention, "model": model, "loss": loss, "top": 3, "rotary": rotary}
    return data | {"schema": SCHEMA_VERSION} | more


def paths(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in plain data."""
    parts = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(found for key, item in parts for found in paths(item, (*path, key)))]


def known(written: Any, data: Any) -> Any:
    """Return what of `data` stands in `written` too: fields that no record has are ignored."""
    if isinstance(written, dict) and isinstance(data, dict):
        return {key: known(value, data[key]) for key, value in written.items() if key in data}
    if isinstance(written, list) and isinstance(data, list) and len(written) == len(data):
        return [known(*pair) for pair in zip(written, data, strict=True)]
    return data


def given_in(written: Any, data: Any) -> Any:
    """Return `written` without what `data` does not say: defaults of fields that are missing."""
    if isinstance(written, dict) and isinstance(data, dict):
        return {key: given_in(value, data[key]) for key, value in written.items() if key in data}
    if isinstance(written, list) and isinstance(data, list) and len(written) == len(data):
        return [given_in(*pair) for pair in zip(written, data, strict=True)]
    return written


SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("ab\n\0é", max_size=4)
VALUES = st.recursive(
    SCALARS | st.sampled_from([10**400, -1, 0, "full", "../x", "a\0b", [], {}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab\n", max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data(), count=st.integers(1, 3))
@settings(max_examples=400, deadline=None)
def test_a_changed_file_is_read_as_it_is_or_refused(data: st.DataObject, count: int) -> None:
    """Prevents a traceback from a file that was edited by hand, and a value that is silently another."""
    changed = copy.deepcopy(example())
    for _ in range(count):
        *parents, last = data.draw(st.sampled_from(paths(changed)[1:]))
        place = changed
        for part in parents:
            place = place[part]
        if data.draw(st.booleans()):
            place[last] = data.draw(VALUES)
        else:
            del place[last]
        if not changed:
            return
    try:
        record = parse_record(changed, EXAMPLE)
    except TraceError as error:
        lines = str(error).splitlines()
    else:
        lines = []
        written = to_json(record)
        assert given_in(written, changed) == known(written, changed)
        assert parse_record(written, EXAMPLE) == record
    assert len(lines) in (0, 2)


def test_what_is_written_is_what_was_read(tmp_path: Path) -> None:
    record = read_record(EXAMPLE)
    write_record(tmp_path, record)
    before, after = (json.loads((place / HEADER).read_text()) for place in (EXAMPLE, tmp_path))
    assert {name: value for name, value in after.items() if name in before} == before
    assert [name for name in after if name in before] == list(before)
    later = {*SINCE[4], SEAL}
    assert set(after) - set(before) == later, "fields of a later version get their defaults, and a checksum is added"
    assert read_record(tmp_path) == record


@pytest.mark.parametrize("version", range(OLDEST_VERSION, SCHEMA_VERSION + 1))
def test_every_version_so_far_is_read(version: int, tmp_path: Path) -> None:
    data = json.loads((EXAMPLE / HEADER).read_text()) | {"schema": version}
    later = [name for since, names in SINCE.items() if since > version for name in names]
    old = parse_record({name: value for name, value in data.items() if name not in later}, tmp_path)
    assert (old.schema, old.header.query_stride, old.header.attention) == (version, 1, [])
    assert old.header.vector_dtype == "float32"
    assert (old.identity == read_record(EXAMPLE).identity) == (version < SEALED_SINCE)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("heads",), "8", "heads: expected `int`, got `str`"),
        (("heads",), True, "heads: expected `int`, got `bool`"),
        (("kv_heads",), 3, "kv_heads: 3 do not share 8 query heads evenly"),
        (("kv_heads",), 0, "kv_heads: expected `int` >= 1"),
        (("layers", 0), -1, r"layers\[0\]: expected `int` >= 0"),
        (("layers", 0), 2, "layers: they are not ascending numbers below n_layers, 4"),
        (("sliding_window",), [None], "sliding_window: it has 1 entries for 4 layers"),
        (("softcap",), math.inf, "softcap: expected `float` <= "),
        (("source",), "dream", "source: invalid enum value 'dream'"),
        (("model",), [], r"model: expected `object`, got `array`"),
        (("model", "weights"), None, "model.weights: is missing beside hidden"),
        (("prompts", 0, "tokens"), 1.5, r"prompts\[0\].tokens: expected `int \| null`, got `float`"),
        (("sampling", "temperature"), "hot", r"sampling.temperature: expected `float \| null`, got `str`"),
        (("sequences", 0, "prompt"), 10**6, r"sequences\[0\].prompt: 1000000 is above its length 107"),
        (("sizes", "../x"), 1, "checksums: their files differ from those of sizes"),
        (("sizes", "tokens.parquet"), -1, r"sizes\[...\]: expected `int` >= 0"),
        (("created",), None, "created: expected `str`, got `null`"),
        (("loss", "worst"), None, "loss.worst: expected `float`, got `null`"),
        (("rotary", 0, "partners", 3), 40, "rotary: its numbers are not those of 40 dimensions"),
        (("rotary", 0, "frequencies"), [1.0], "rotary: its numbers are not those of 40 dimensions"),
        (("rotary", 0, "layers"), [0, 2], r"rotary: it is of layers \[0, 2\], not of each recorded one"),
    ],
)
def test_the_field_is_named(path: tuple[Any, ...], value: object, message: str) -> None:
    data = example()
    place: Any = data
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(TraceError, match=rf"example is damaged: trace\.json: {message}"):
        parse_record(data, EXAMPLE)


def test_a_file_outside_of_the_trace_is_refused() -> None:
    data = example()
    data["sizes"]["../x"], data["checksums"]["../x"] = 1, "0" * 64
    with pytest.raises(TraceError, match=r"sizes: '\.\./x' is not a file of this trace"):
        parse_record(data, EXAMPLE)


@pytest.mark.parametrize("text", ["[]", "7", "{", "[" * 100_000, "\ud800"])
def test_what_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / HEADER).write_text(text, errors="surrogatepass")
    with pytest.raises(TraceError, match=r"is of another kind|is not JSON"):
        read_record(tmp_path)


def test_a_file_name_that_is_no_unicode_comes_back(tmp_path: Path) -> None:
    """Prevents a recording of a prompt with such a name from being called damaged."""
    data = example()
    data["prompts"][0]["file"] = "p\udcff.txt"
    write_record(tmp_path, parse_record(data, tmp_path))
    assert read_record(tmp_path).header.prompts[0].file == "p\udcff.txt"


@pytest.mark.parametrize("kind", [TraceRecord, TraceHeader])
def test_every_field_is_documented(kind: type) -> None:
    assert all(about for _, _, about in described(kind))

"""Read and write ``trace.json``; no other module does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar, cast

from kvscope.core.errors import RECORD_ONE, TraceError
from kvscope.core.json import Json, JsonDict
from kvscope.core.json_records import FieldError, decode, plain
from kvscope.core.output import incomplete, require_not_set_aside
from kvscope.core.seal import SEAL, is_changed, sealed
from kvscope.core.version import __version__
from kvscope.trace.members import members
from kvscope.trace.record import ModelRecord, TraceHeader, TraceRecord
from kvscope.trace.schema import HEADER, KIND, OLDEST_VERSION, SCHEMA_VERSION, SEALED_SINCE, SIGNALS

V = TypeVar("V")


def read_record(path: Path) -> TraceRecord:
    """Return the record of a complete trace of any version up to this one.

    Raises
    ------
    TraceError
        If there is no trace, or it is incomplete, damaged, or of a version that cannot be read.
    """
    return record_of(_read_header(path), path)


def record_of(content: bytes, path: Path | str) -> TraceRecord:
    """Return the record from the bytes of ``trace.json`` of the trace at `path`; errors as `read_record`."""
    try:
        data = json.loads(content.decode("utf-8", errors="surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise TraceError(
            f"trace {path} is damaged: {HEADER} is not JSON ({error})", "Record the trace again."
        ) from error
    data = data if isinstance(data, dict) else {}
    record = parse_record(data, path)
    if is_changed(data) or (record.schema >= SEALED_SINCE and SEAL not in data):
        raise TraceError(
            f"trace {path} is damaged: {HEADER} was changed since it was written: its checksum differs",
            "Record the trace again.",
        )
    return record


def parse_record(data: Mapping[str, object], path: Path | str) -> TraceRecord:
    """Return the record from the content of ``trace.json`` of the trace at `path`; errors as `read_record`."""
    _require_readable(data, path)
    try:
        record = decode(
            {**data, "header": {**data, "model": _renamed(data.get("model"), "class", "class_name")}}, TraceRecord
        )
        _require_consistent(record)
    except FieldError as error:
        field = str(error).removeprefix("header.").replace("model.class_name", "model.class")
        raise TraceError(f"trace {path} is damaged: {HEADER}: {field}", "Record the trace again.") from error
    return record


def to_json(record: TraceRecord) -> JsonDict:
    """Return the content of ``trace.json``."""
    data = plain(record)
    first = {name: data.pop(name) for name in ("kind", "schema", "kvscope")}
    del data["header"]
    return {**first, **header_to_json(record.header), **data}


def header_to_json(header: TraceHeader) -> JsonDict:
    """Return the part of ``trace.json`` that is known before a recording starts."""
    return {**plain(header), "model": model_to_json(header.model)}


def model_to_json(model: ModelRecord) -> Json:
    """Return the model's part of ``trace.json``."""
    return _renamed(plain(model), "class_name", "class")


def _renamed(data: V, old: str, new: str) -> V:
    """Return an object with one field renamed, at the same place: ``class`` cannot be the name of an attribute."""
    if not isinstance(data, dict):
        return data
    return cast(V, {new if name == old else name: value for name, value in data.items()})


def write_record(folder: Path, record: TraceRecord) -> None:
    """Write ``trace.json`` of a finished trace, with its checksum; raises OSError if it cannot be written."""
    _write_json(folder, sealed(to_json(record)))


def write_unfinished(folder: Path, header: TraceHeader, writer: Mapping[str, object]) -> None:
    """Write ``trace.json`` of a recording that starts; `writer` identifies the process that records it."""
    made = {"kind": KIND, "schema": SCHEMA_VERSION, "kvscope": __version__}
    _write_json(folder, {**made, **header_to_json(header), "complete": False, "writer": dict(writer)})


def _write_json(folder: Path, data: Mapping[str, object]) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    (folder / HEADER).write_text(text, encoding="utf-8", errors="surrogatepass")


def _read_header(path: Path) -> bytes:
    file = path / HEADER
    if not path.exists():
        require_not_set_aside(path, "trace", TraceError)
        unfinished = incomplete(path)
        if unfinished.exists():
            raise TraceError(f"trace {path} is incomplete: recording stopped before its end", _again(unfinished))
        raise TraceError(f"no trace at {path}", RECORD_ONE)
    if not file.is_file():
        raise TraceError(f"{path} is not a kvscope trace: it has no {HEADER}", "Name a folder under traces/.")
    return file.read_bytes()


def _require_readable(data: Mapping[str, object], path: Path | str) -> None:
    if data.get("kind") != KIND:
        raise TraceError(f"{path} is not a kvscope trace: {HEADER} is of another kind", "Name a folder under traces/.")
    schema = data.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < OLDEST_VERSION:
        raise TraceError(f"trace {path} has the older format {schema!r}", "Record it again with this kvscope.")
    if schema > SCHEMA_VERSION:
        raise TraceError(
            f"trace {path} has format {schema}, newer than this kvscope reads ({SCHEMA_VERSION})", "Update kvscope."
        )
    if not data.get("complete"):
        raise TraceError(f"trace {path} is incomplete: recording stopped before its end", _again(path))


def _require_consistent(record: TraceRecord) -> None:
    """Raise FieldError if fields contradict each other."""
    header, count = record.header, len(record.header.layers)
    if header.layers != sorted(set(header.layers)) or not header.layers or header.layers[-1] >= header.n_layers:
        raise FieldError("layers", f"they are not ascending numbers below n_layers, {header.n_layers}")
    for name, values in (("layer_types", header.layer_types), ("sliding_window", header.sliding_window)):
        if len(values) != count:
            raise FieldError(name, f"it has {len(values)} entries for {count} layers")
    if header.chunk_size and len(header.chunk_size) != count:
        raise FieldError("chunk_size", f"it has {len(header.chunk_size)} entries for {count} layers")
    if not set(header.shared_cache) <= set(map(str, header.layers)):
        raise FieldError("shared_cache", "it names layers that were not recorded")
    strangers = set(header.other_layers) - {str(layer) for layer in range(header.n_layers)}
    if strangers or set(header.other_layers) & set(map(str, header.layers)):
        raise FieldError("other_layers", "it names layers that the model does not have, or that were recorded")
    if header.attention and len(header.attention) != count:
        raise FieldError("attention", f"it has {len(header.attention)} entries for {count} layers")
    unknown = sorted(set(header.stored) - SIGNALS)
    if unknown or len(set(header.stored)) < len(header.stored):
        raise FieldError("stored", f"it names {unknown[0]!r}" if unknown else "it names a signal twice")
    if not record.sequences:
        raise FieldError("sequences", "there is none")
    _require_heads(header)
    _require_rotary(header)
    for index, sequence in enumerate(record.sequences):
        if sequence.prompt > sequence.length:
            raise FieldError(f"sequences[{index}].prompt", f"{sequence.prompt} is above its length {sequence.length}")
        if any(not span.start < span.stop <= sequence.prompt for span in sequence.spans):
            raise FieldError(f"sequences[{index}].spans", "one is not inside of the prompt")
        if any(not one.start < one.stop <= sequence.prompt for one in sequence.images):
            raise FieldError(f"sequences[{index}].images", "one is not inside of the prompt")
    if "hidden" in header.stored and header.model.weights is None:
        raise FieldError("model.weights", "is missing beside hidden")
    if record.sizes.keys() != record.checksums.keys():
        raise FieldError("checksums", "their files differ from those of sizes")
    expected = members(header).keys()
    for name in (*expected - record.sizes.keys(), *record.sizes.keys() - expected):
        what = "is missing" if name in expected else "is not a file of this trace"
        raise FieldError("sizes", f"{name!r} {what}")


def _require_heads(header: TraceHeader) -> None:
    """Raise FieldError if the heads of a layer cannot be shared, or are not those that the header names of all."""
    if header.layer_heads:
        if len(header.layer_heads) != len(header.layers):
            count = len(header.layer_heads)
            raise FieldError("layer_heads", f"it has {count} entries for {len(header.layers)} layers")
        for name in ("heads", "kv_heads", "head_dim"):
            most = max(getattr(one, name) for one in header.layer_heads)
            if most != getattr(header, name):
                raise FieldError("layer_heads", f"the most {name} of a layer are {most}, not {getattr(header, name)}")
    for layer in header.layers:
        own, where = header.heads_of(layer), f"layer_heads of layer {layer}" if header.layer_heads else "kv_heads"
        if own.heads % own.kv_heads:
            raise FieldError(where, f"{own.kv_heads} do not share {own.heads} query heads evenly")


def _require_rotary(header: TraceHeader) -> None:
    """Raise FieldError unless rotary embeddings, if any, are of all layers and of the sizes of their heads."""
    named = sorted(layer for record in header.rotary for layer in record.layers)
    if header.rotary and named != header.layers:
        raise FieldError("rotary", f"it is of layers {named}, not of each recorded one")
    for record in header.rotary:
        size = header.heads_of(record.layers[0]).head_dim if record.layers else 0
        if not len(record.frequencies) == len(record.partners) == size or not set(record.partners) <= set(range(size)):
            raise FieldError("rotary", f"its numbers are not those of {size} dimensions")


def _again(path: Path | str) -> str:
    return f"Record it again; {path} can be removed."

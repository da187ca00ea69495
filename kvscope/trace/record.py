"""``trace.json`` as typed records: the only module that reads and writes it.

`TraceHeader` is what is known before a recording starts, `TraceRecord` the whole file of a finished trace. Types,
ranges and documentation of the fields stand in their annotations (see `kvscope.core.json_records`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, TypeVar, cast

from kvscope.core.errors import RECORD_ONE, TraceError
from kvscope.core.json import Json, JsonDict
from kvscope.core.json_records import FieldError, Finite, NotNegative, Number, Positive, about, decode, plain
from kvscope.trace.schema import (
    DERIVED,
    HEADER,
    KIND,
    MAPS,
    MAPS_AND_VECTORS,
    MEMBERS,
    OLDEST_VERSION,
    QKV,
    SCHEMA_VERSION,
    TOPK,
    VECTORS,
)

V = TypeVar("V")


@dataclass(frozen=True)
class LayerAttention:
    """How a layer turns queries and keys into weights: scale, cap, mask, softmax with the sinks, which are left out."""

    scaling: Annotated[Finite, about("factor of the logits")]
    softcap: Annotated[Finite | None, about("cap of the scaled logits: softcap * tanh(logits / softcap)")] = None
    sliding_window: Annotated[Positive | None, about("keys that a query sees at most, itself included")] = None
    sinks: Annotated[list[float] | None, about("learned sink logit of each query head")] = None
    mask: Annotated[str, about("`causal`: a query sees itself and earlier keys, within the window")] = "causal"


@dataclass(frozen=True)
class AttentionKernel:
    """How the model computed attention while it was recorded."""

    kernel: Annotated[str | None, about("attention implementation in transformers: `sdpa`, `eager`, ...")] = None
    scaling: Annotated[Finite | None, about("factor of the logits, of the first layer")] = None


@dataclass(frozen=True)
class ModelRecord:
    """The model that was recorded, or the file that was imported."""

    id: Annotated[str | None, about("name by which it can be loaded again; of an import, what file it was")] = None
    revision: Annotated[str | None, about("commit of a Hub model")] = None
    class_name: Annotated[str | None, about("its class in transformers", omit=True)] = None
    dtype: Annotated[str | None, about("dtype of its weights: `float32`, `bfloat16`, ...", omit=True)] = None
    config: Annotated[dict[str, object] | None, about("its configuration, as transformers has it", omit=True)] = None
    attention: Annotated[AttentionKernel | None, about("how it computed attention", omit=True)] = None
    weights: Annotated[
        list[float] | None, about("a sample of its weights, by which it is known again; beside `hidden`", omit=True)
    ] = None
    sha256: Annotated[str | None, about("SHA-256 of the imported file", omit=True)] = None


@dataclass(frozen=True)
class PromptRecord:
    """One prompt."""

    file: Annotated[str | None, about("its file, if it came from one")] = None
    text: Annotated[str | None, about("its text, of an import", omit=True)] = None
    sha256: Annotated[str | None, about("SHA-256 of its text in UTF-8")] = None
    tokens: Annotated[Number | None, about("its tokens, of a recording", omit=True)] = None


@dataclass(frozen=True)
class SamplingRecord:
    """How the next token was chosen, as in transformers' ``generate``; nothing for an import."""

    do_sample: Annotated[bool | None, about("whether tokens were drawn at random", omit=True)] = None
    temperature: Annotated[NotNegative | None, about("divisor of the logits", omit=True)] = None
    top_p: Annotated[NotNegative | None, about("smallest set of tokens of this probability", omit=True)] = None
    top_k: Annotated[Number | None, about("so many likeliest tokens; 0 is all", omit=True)] = None


@dataclass(frozen=True)
class SequenceRecord:
    """Lengths of one sequence."""

    prompt: Annotated[Positive, about("tokens of the prompt, P")]
    length: Annotated[Positive, about("tokens altogether, T")]
    forced: Annotated[bool, about("whether the continuation was given")] = False


@dataclass(frozen=True)
class StorageError:
    """How far rebuilt rows can be from the recorded ones: shares of a row's mass outside its stored weights."""

    mean: Annotated[NotNegative, about("mean over all rows")]
    mean_after_prompt: Annotated[NotNegative | None, about("mean over rows after the prompt; null without any")]
    worst: Annotated[NotNegative, about("largest of all rows and heads")]


@dataclass(frozen=True)
class TraceHeader:
    """What ``trace.json`` says of a trace, apart from what is known only at its end."""

    source: Annotated[Literal["model", "import"], about("where the rows come from")]
    protocol: Annotated[
        Literal["generated", "forced", "import"], about("whether the model wrote the continuation or it was given")
    ]
    model: Annotated[ModelRecord, about("which model")]
    layers: Annotated[list[Number], about("recorded layers, by their number in the model")]
    n_layers: Annotated[Positive, about("layers of the model, L")]
    heads: Annotated[Positive, about("query heads of a layer that were recorded, H")]
    kv_heads: Annotated[Positive, about("key/value heads of a layer that were recorded, G")]
    head_dim: Annotated[Number, about("size of a head, D; 0 where an import has no vectors")]
    layer_types: Annotated[list[str], about("`full` or `sliding`, of each recorded layer")]
    sliding_window: Annotated[list[Positive | None], about("keys that a query of the layer sees at most; null is all")]
    learned_sinks: Annotated[
        bool, about("whether rows sum to less than one because a learned sink takes part in the softmax")
    ] = False
    softcap: Annotated[Finite | None, about("cap of the attention logits")] = None
    stored: Annotated[
        list[str],
        about(
            "signals: `maps`, `topk`, `value_l1`, `value_l2`, `key_l2`, `similarity`, `queries`, `hidden`, "
            "`vectors:keys`, ..."
        ),
    ] = field(default_factory=lambda: [MAPS])
    attention: Annotated[
        list[LayerAttention], about("store `qkv`: how each recorded layer makes rows; otherwise empty")
    ] = field(default_factory=list)
    prefill_chunk: Annotated[
        Positive | None, about("tokens of a prompt that went through the model at a time, if it had more")
    ] = None
    top: Annotated[Positive | None, about("store `topk`: weights of a row that are kept at most")] = None
    head_numbers: Annotated[list[Number], about("where only some query heads were recorded, which of the model's")] = (
        field(default_factory=list)
    )
    n_heads: Annotated[Positive | None, about("with `head_numbers`: query heads of the model")] = None
    query_stride: Annotated[Positive, about("every how many-th row was recorded: with 4, positions 3, 7, 11, ...")] = 1
    prompts: Annotated[list[PromptRecord], about("prompt of each sequence")] = field(default_factory=list)
    device: Annotated[str | None, about("device that computed it")] = "cpu"
    seed: Annotated[int | None, about("seed of the sampling")] = None
    sampling: Annotated[SamplingRecord, about("how the next token was chosen")] = SamplingRecord()
    tokenizer: Annotated[str | None, about("class of the tokenizer")] = None
    versions: Annotated[dict[str, str], about("versions of what recorded it")] = field(default_factory=dict)
    command: Annotated[str | None, about("command line that recorded it")] = None

    @property
    def store(self) -> str:
        """Which of `STORES` it is, as far as rows and vectors go; an import may hold some vectors only."""
        if TOPK in self.stored:
            return TOPK
        if MAPS not in self.stored:
            return QKV
        return MAPS_AND_VECTORS if any(f"vectors:{name}" in self.stored for name in VECTORS) else MAPS

    @property
    def derived(self) -> list[str]:
        """Signals that are not stored and follow from the vectors that are."""
        return [
            signal
            for signal, vectors in DERIVED.items()
            if signal not in self.stored
            and all(f"vectors:{name}" in self.stored for name in vectors)
            and (signal != "maps" or len(self.attention) == len(self.layers))
            and (signal != "queries" or not self.head_numbers)  # the mean is over all heads of the model
        ]

    def attention_of(self, layer: int) -> LayerAttention:
        """Return how a recorded layer turns queries and keys into weights, where the header says so."""
        return self.attention[self.layers.index(layer)]


@dataclass(frozen=True, kw_only=True)
class TraceRecord:
    """Everything in ``trace.json`` of a finished trace."""

    kind: Annotated[Literal["kvscope-trace"], about("what the folder is")] = KIND
    schema: Annotated[Positive, about("version of the format")] = SCHEMA_VERSION
    kvscope: Annotated[str | None, about("version of kvscope that wrote it")] = None
    header: Annotated[TraceHeader, about("what is known before the recording starts")]
    complete: Annotated[bool, about("false while it is written")] = True
    created: Annotated[str, about("when it was finished, ISO 8601 in UTC")]
    sequences: Annotated[list[SequenceRecord], about("lengths of each sequence")]
    loss: Annotated[StorageError | None, about("store `topk`: what the stored weights lack", omit=True)] = None
    bytes: Annotated[Number | None, about("bytes of all Parquet files")] = None
    sizes: Annotated[dict[str, Number], about("bytes of each Parquet file")]
    checksums: Annotated[dict[str, str], about("SHA-256 of each Parquet file")]

    @property
    def storage_error(self) -> StorageError | None:
        """How far rebuilt rows can be from the recorded ones; None where every row is stored."""
        return self.loss

    @property
    def identity(self) -> str:
        """SHA-256 over the checksums of the files: two traces with the same content have the same."""
        return hashlib.sha256(json.dumps(self.checksums, sort_keys=True).encode()).hexdigest()


def read_record(path: Path) -> TraceRecord:
    """Return what ``trace.json`` says of a whole trace of any version up to this one.

    Raises
    ------
    TraceError
        Each with its own message: nothing there, not a trace, older, newer, incomplete, damaged.
    """
    return parse_record(_read_json(path), path)


def parse_record(data: Mapping[str, object], path: Path) -> TraceRecord:
    """Return the record in the content of ``trace.json`` of the trace at `path`; raises as `read_record`."""
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
    """Return what ``trace.json`` says of a trace before the recording starts."""
    return {**plain(header), "model": model_to_json(header.model)}


def model_to_json(model: ModelRecord) -> Json:
    """Return what ``trace.json`` says of the model."""
    return _renamed(plain(model), "class_name", "class")


def _renamed(data: V, old: str, new: str) -> V:
    """Return an object with one field renamed in its place: ``class`` cannot be the name of an attribute."""
    if not isinstance(data, dict):
        return data
    return cast(V, {new if name == old else name: value for name, value in data.items()})


def write_record(folder: Path, record: TraceRecord) -> None:
    """Write ``trace.json`` of a finished trace; raises OSError where it cannot be written."""
    _write_json(folder, to_json(record))


def write_unfinished(folder: Path, header: TraceHeader, writer: Mapping[str, object]) -> None:
    """Write ``trace.json`` of a recording that starts; `writer` says which process writes it."""
    made = {"kind": KIND, "schema": SCHEMA_VERSION, "kvscope": version("kvscope")}
    _write_json(folder, {**made, **header_to_json(header), "complete": False, "writer": dict(writer)})


def _write_json(folder: Path, data: Mapping[str, object]) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    (folder / HEADER).write_text(text, encoding="utf-8", errors="surrogatepass")


def _read_json(path: Path) -> Mapping[str, object]:
    file = path / HEADER
    if not path.exists():
        unfinished = path.with_name(path.name + ".incomplete")
        if unfinished.exists():
            raise TraceError(f"trace {path} is incomplete: recording stopped before its end", _again(unfinished))
        raise TraceError(f"no trace at {path}", RECORD_ONE)
    if not file.is_file():
        raise TraceError(f"{path} is not a kvscope trace: it has no {HEADER}", "Name a folder under traces/.")
    try:
        data = json.loads(file.read_text(encoding="utf-8", errors="surrogatepass"))
    except (ValueError, RecursionError) as error:
        raise TraceError(
            f"trace {path} is damaged: {HEADER} is no JSON ({error})", "Record the trace again."
        ) from error
    return data if isinstance(data, dict) else {}


def _require_readable(data: Mapping[str, object], path: Path) -> None:
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
    """Raise FieldError where fields contradict each other."""
    header, count = record.header, len(record.header.layers)
    if header.layers != sorted(set(header.layers)) or not header.layers or header.layers[-1] >= header.n_layers:
        raise FieldError("layers", f"they are not ascending numbers below n_layers, {header.n_layers}")
    for name, values in (("layer_types", header.layer_types), ("sliding_window", header.sliding_window)):
        if len(values) != count:
            raise FieldError(name, f"it has {len(values)} entries for {count} layers")
    if header.attention and len(header.attention) != count:
        raise FieldError("attention", f"it has {len(header.attention)} entries for {count} layers")
    if header.heads % header.kv_heads:
        raise FieldError("kv_heads", f"{header.kv_heads} do not share {header.heads} query heads evenly")
    for index, sequence in enumerate(record.sequences):
        if sequence.prompt > sequence.length:
            raise FieldError(f"sequences[{index}].prompt", f"{sequence.prompt} is above its length {sequence.length}")
    if "hidden" in header.stored and header.model.weights is None:
        raise FieldError("model.weights", "is missing beside hidden")
    if record.sizes.keys() != record.checksums.keys():
        raise FieldError("checksums", "they are of other files than sizes")
    for name in record.sizes:
        if not re.fullmatch(MEMBERS, name):
            raise FieldError("sizes", f"{name!r} is no file of a trace")


def _again(path: Path) -> str:
    return f"Record it again; {path} can be removed."

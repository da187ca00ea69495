"""``trace.json`` as typed records: the only module that reads and writes it.

`TraceHeader` is what is known before a recording starts, `TraceRecord` the whole file of a finished trace. Types,
ranges and documentation of the fields stand in their annotations (see `kvscope.core.decode`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from kvscope.core.decode import About, FieldError, decode, encode
from kvscope.core.errors import TraceError
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


@dataclass(frozen=True)
class LayerAttention:
    """How a layer turns queries and keys into weights: scale, cap, mask, softmax with the sinks, which are left out."""

    scaling: Annotated[float, About("factor of the logits")]
    softcap: Annotated[float | None, About("cap of the scaled logits: softcap * tanh(logits / softcap)")] = None
    sliding_window: Annotated[int | None, About("keys that a query sees at most, itself included", at_least=1)] = None
    sinks: Annotated[list[float] | None, About("learned sink logit of each query head", may_be_nan=True)] = None
    mask: Annotated[str, About("`causal`: a query sees itself and earlier keys, within the window")] = "causal"


@dataclass(frozen=True)
class AttentionKernel:
    """How the model computed attention while it was recorded."""

    kernel: Annotated[str | None, About("attention implementation in transformers: `sdpa`, `eager`, ...")] = None
    scaling: Annotated[float | None, About("factor of the logits, of the first layer")] = None


@dataclass(frozen=True)
class ModelRecord:
    """The model that was recorded, or the file that was imported."""

    id: Annotated[str | None, About("name by which it can be loaded again; of an import, what file it was")] = None
    revision: Annotated[str | None, About("commit of a Hub model")] = None
    class_name: Annotated[str | None, About("its class in transformers", key="class", omit_none=True)] = None
    dtype: Annotated[str | None, About("dtype of its weights: `float32`, `bfloat16`, ...", omit_none=True)] = None
    config: Annotated[dict[str, object] | None, About("its configuration, as transformers has it", omit_none=True)] = (
        None
    )
    attention: Annotated[AttentionKernel | None, About("how it computed attention", omit_none=True)] = None
    weights: Annotated[
        list[float] | None,
        About("a sample of its weights, by which it is known again; beside `hidden`", may_be_nan=True, omit_none=True),
    ] = None
    sha256: Annotated[str | None, About("SHA-256 of the imported file", omit_none=True)] = None


@dataclass(frozen=True)
class PromptRecord:
    """One prompt."""

    file: Annotated[str | None, About("its file, if it came from one")] = None
    text: Annotated[str | None, About("its text, of an import", omit_none=True)] = None
    sha256: Annotated[str | None, About("SHA-256 of its text in UTF-8")] = None
    tokens: Annotated[int | None, About("its tokens, of a recording", at_least=0, omit_none=True)] = None


@dataclass(frozen=True)
class SamplingRecord:
    """How the next token was chosen, as in transformers' ``generate``; nothing for an import."""

    do_sample: Annotated[bool | None, About("whether tokens were drawn at random", omit_none=True)] = None
    temperature: Annotated[float | None, About("divisor of the logits", at_least=0, omit_none=True)] = None
    top_p: Annotated[float | None, About("smallest set of tokens of this probability", at_least=0, omit_none=True)] = (
        None
    )
    top_k: Annotated[int | None, About("so many likeliest tokens; 0 is all", at_least=0, omit_none=True)] = None


@dataclass(frozen=True)
class SequenceRecord:
    """Lengths of one sequence."""

    prompt: Annotated[int, About("tokens of the prompt, P", at_least=1)]
    length: Annotated[int, About("tokens altogether, T", at_least=1)]
    forced: Annotated[bool, About("whether the continuation was given")] = False


@dataclass(frozen=True)
class StorageError:
    """How far rebuilt rows can be from the recorded ones: shares of a row's mass outside its stored weights."""

    mean: Annotated[float, About("mean over all rows", at_least=0)]
    mean_after_prompt: Annotated[float | None, About("mean over rows after the prompt; null without any", at_least=0)]
    worst: Annotated[float, About("largest of all rows and heads", at_least=0)]


@dataclass(frozen=True)
class TraceHeader:
    """What ``trace.json`` says of a trace, apart from what is known only at its end."""

    source: Annotated[Literal["model", "import"], About("where the rows come from")]
    protocol: Annotated[
        Literal["generated", "forced", "import"], About("whether the model wrote the continuation or it was given")
    ]
    model: Annotated[ModelRecord, About("which model")]
    layers: Annotated[list[int], About("recorded layers, by their number in the model", at_least=0)]
    n_layers: Annotated[int, About("layers of the model, L", at_least=1)]
    heads: Annotated[int, About("query heads of a layer that were recorded, H", at_least=1)]
    kv_heads: Annotated[int, About("key/value heads of a layer that were recorded, G", at_least=1)]
    head_dim: Annotated[int, About("size of a head, D; 0 where an import has no vectors", at_least=0)]
    layer_types: Annotated[list[str], About("`full` or `sliding`, of each recorded layer")]
    sliding_window: Annotated[
        list[int | None], About("keys that a query of the layer sees at most; null is all", at_least=1)
    ]
    learned_sinks: Annotated[
        bool, About("whether rows sum to less than one because a learned sink takes part in the softmax")
    ] = False
    softcap: Annotated[float | None, About("cap of the attention logits")] = None
    stored: Annotated[
        list[str],
        About(
            "signals: `maps`, `topk`, `value_l1`, `value_l2`, `key_l2`, `similarity`, `queries`, `hidden`, "
            "`vectors:keys`, ..."
        ),
    ] = field(default_factory=lambda: [MAPS])
    attention: Annotated[
        list[LayerAttention], About("store `qkv`: how each recorded layer makes rows; otherwise empty")
    ] = field(default_factory=list)
    prefill_chunk: Annotated[
        int | None, About("tokens of a prompt that went through the model at a time, if it had more", at_least=1)
    ] = None
    top: Annotated[int | None, About("store `topk`: weights of a row that are kept at most", at_least=1)] = None
    head_numbers: Annotated[
        list[int], About("where only some query heads were recorded, which of the model's", at_least=0)
    ] = field(default_factory=list)
    n_heads: Annotated[int | None, About("with `head_numbers`: query heads of the model", at_least=1)] = None
    query_stride: Annotated[
        int, About("every how many-th row was recorded: with 4, positions 3, 7, 11, ...", at_least=1)
    ] = 1
    prompts: Annotated[list[PromptRecord], About("prompt of each sequence")] = field(default_factory=list)
    device: Annotated[str | None, About("device that computed it")] = "cpu"
    seed: Annotated[int | None, About("seed of the sampling")] = None
    sampling: Annotated[SamplingRecord, About("how the next token was chosen")] = SamplingRecord()
    tokenizer: Annotated[str | None, About("class of the tokenizer")] = None
    versions: Annotated[dict[str, str], About("versions of what recorded it")] = field(default_factory=dict)
    command: Annotated[str | None, About("command line that recorded it")] = None

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

    kind: Annotated[Literal["kvscope-trace"], About("what the folder is")] = KIND
    schema: Annotated[int, About("version of the format", at_least=OLDEST_VERSION)] = SCHEMA_VERSION
    kvscope: Annotated[str | None, About("version of kvscope that wrote it")] = None
    header: Annotated[TraceHeader, About("what is known before the recording starts", inline=True)]
    complete: Annotated[Literal[True], About("false while it is written")] = True
    created: Annotated[str, About("when it was finished, ISO 8601 in UTC")]
    sequences: Annotated[list[SequenceRecord], About("lengths of each sequence")]
    storage_error: Annotated[
        StorageError | None, About("store `topk`: what the stored weights lack", key="loss", omit_none=True)
    ] = None
    bytes: Annotated[int | None, About("bytes of all Parquet files", at_least=0)] = None
    sizes: Annotated[dict[str, int], About("bytes of each Parquet file", at_least=0)]
    checksums: Annotated[dict[str, str], About("SHA-256 of each Parquet file")]

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
        record = decode(TraceRecord, data)
        _require_consistent(record)
    except FieldError as error:
        raise TraceError(f"trace {path} is damaged: {HEADER}: {error}", "Record the trace again.") from error
    return record


def write_record(folder: Path, record: TraceRecord) -> None:
    """Write ``trace.json`` of a finished trace; raises OSError where it cannot be written."""
    _write_json(folder, encode(record))


def write_unfinished(folder: Path, header: TraceHeader, writer: Mapping[str, object]) -> None:
    """Write ``trace.json`` of a recording that starts; `writer` says which process writes it."""
    made = {"kind": KIND, "schema": SCHEMA_VERSION, "kvscope": version("kvscope")}
    _write_json(folder, {**made, **encode(header), "complete": False, "writer": dict(writer)})


def _write_json(folder: Path, data: Mapping[str, object]) -> None:
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    (folder / HEADER).write_text(text, encoding="utf-8", errors="surrogatepass")


def _read_json(path: Path) -> Mapping[str, object]:
    file = path / HEADER
    if not path.exists():
        unfinished = path.with_name(path.name + ".incomplete")
        if unfinished.exists():
            raise TraceError(f"trace {path} is incomplete: recording stopped before its end", _again(unfinished))
        raise TraceError(f"no trace at {path}", "Record one: kvscope trace --model demo prompt.txt")
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

"""The content of ``trace.json`` as typed records; `kvscope.trace.record_file` reads and writes the file.

`TraceHeader` is what is known before a recording starts, `TraceRecord` the whole file of a finished trace. The
annotations of the fields define their types, ranges and documentation (see `kvscope.core.json_records`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from kvscope.core.json import JsonDict
from kvscope.core.json_records import Checksum, Finite, NotNegative, Number, Positive, about, plain
from kvscope.core.seal import seal_of
from kvscope.trace.columns import VectorType
from kvscope.trace.layer_records import AttentionKernel, LayerAttention, LayerHeads, RotaryRecord
from kvscope.trace.prompt_parts import ExampleRecord, ImageRecord, SpanRecord
from kvscope.trace.schema import DERIVED, KIND, MAPS, MAPS_AND_VECTORS, QKV, SCHEMA_VERSION, SEALED_SINCE, TOPK, VECTORS

# Fields of the header that say how the trace came about, and decide nothing.
PROVENANCE = ("model", "prompts", "device", "seed", "sampling", "tokenizer", "versions", "command")


@dataclass(frozen=True)
class ModelRecord:
    """The model that was recorded, or the file that was imported."""

    id: Annotated[str | None, about("name or folder to load it by; for an import, the name of the file")] = None
    revision: Annotated[str | None, about("commit of a Hub model")] = None
    class_name: Annotated[str | None, about("its class in transformers", omit=True)] = None
    dtype: Annotated[str | None, about("dtype of its weights: `float32`, `bfloat16`, ...", omit=True)] = None
    quantization: Annotated[
        str | None, about("how its weights were quantised: `gguf Q8_0`, `bitsandbytes 4bit`, `fp8`, ...", omit=True)
    ] = None
    base: Annotated[str | None, about("for an adapter, the model that it changes", omit=True)] = None
    config: Annotated[dict[str, object] | None, about("its configuration, as transformers has it", omit=True)] = None
    attention: Annotated[AttentionKernel | None, about("how it computed attention", omit=True)] = None
    weights: Annotated[
        list[float] | None, about("sample of its weights, which identifies it; only with `hidden`", omit=True)
    ] = None
    sha256: Annotated[str | None, about("SHA-256 of the imported file", omit=True)] = None


@dataclass(frozen=True)
class PromptRecord:
    """One prompt."""

    file: Annotated[str | None, about("file that it was read from")] = None
    text: Annotated[
        str | None, about("its text; only of imports, and of chats, as the template rendered it", omit=True)
    ] = None
    sha256: Annotated[str | None, about("SHA-256 of its text in UTF-8")] = None
    tokens: Annotated[Number | None, about("number of its tokens; recordings only", omit=True)] = None
    field: Annotated[
        str | None, about("field of the JSON object that it was read from, or fields joined by `+`", omit=True)
    ] = None


@dataclass(frozen=True)
class SamplingRecord:
    """How the next token was chosen, as in transformers' ``generate``; empty for an import."""

    do_sample: Annotated[bool | None, about("whether tokens were drawn at random", omit=True)] = None
    temperature: Annotated[NotNegative | None, about("divisor of the logits", omit=True)] = None
    top_p: Annotated[NotNegative | None, about("smallest set of tokens of this probability", omit=True)] = None
    top_k: Annotated[Number | None, about("number of likeliest tokens to choose from; 0 for all", omit=True)] = None


@dataclass(frozen=True)
class SequenceRecord:
    """Lengths of one sequence, and what its dataset says about it."""

    prompt: Annotated[Positive, about("tokens of the prompt, P")]
    length: Annotated[Positive, about("tokens altogether, T")]
    forced: Annotated[bool, about("whether the continuation was forced")] = False
    answers: Annotated[
        list[str] | None, about("right answers, where the prompt was read from a JSON object that has them", omit=True)
    ] = None
    example: Annotated[ExampleRecord | None, about("other facts of that object", omit=True)] = None
    spans: Annotated[list[SpanRecord], about("named parts of the prompt, where that object has them", omit=True)] = (
        field(default_factory=list)
    )
    images: Annotated[list[ImageRecord], about("images of the prompt, in order", omit=True)] = field(
        default_factory=list
    )


@dataclass(frozen=True)
class StorageError:
    """How far rebuilt rows can be from the recorded ones: shares of a row's mass outside its stored weights."""

    mean: Annotated[NotNegative, about("mean over all rows")]
    mean_after_prompt: Annotated[NotNegative | None, about("mean over rows after the prompt; null if there are none")]
    worst: Annotated[NotNegative, about("maximum over all rows and heads")]


@dataclass(frozen=True)
class TraceHeader:
    """The part of ``trace.json`` that is known before the recording starts."""

    source: Annotated[Literal["model", "import"], about("where the rows come from")]
    protocol: Annotated[
        Literal["generated", "forced", "import"], about("whether the model generated the continuation or it was forced")
    ]
    model: Annotated[ModelRecord, about("the model")]
    layers: Annotated[list[Number], about("recorded layers, by their number in the model")]
    n_layers: Annotated[Positive, about("layers of the model, L")]
    heads: Annotated[Positive, about("query heads of a layer that were recorded, H; the most where layers differ")]
    kv_heads: Annotated[Positive, about("key/value heads of a layer that were recorded, G; the most, too")]
    head_dim: Annotated[Number, about("size of a head, D; 0 where an import has no vectors; the largest, too")]
    layer_types: Annotated[list[str], about("`full`, `sliding` or `chunked`, of each recorded layer")]
    sliding_window: Annotated[list[Positive | None], about("most keys that a query of the layer sees; null for all")]
    learned_sinks: Annotated[
        bool, about("whether rows sum to less than one because a learned sink takes part in the softmax")
    ] = False
    softcap: Annotated[Finite | None, about("cap of the attention logits")] = None
    stored: Annotated[
        list[str],
        about(
            "signals: `maps`, `topk`, `value_l1`, `value_l2`, `key_l2`, `similarity`, `queries`, `hidden`, "
            "`value_out_l1`, `reconstruction`, `vectors:keys`, ..."
        ),
    ] = field(default_factory=lambda: [MAPS])
    attention: Annotated[
        list[LayerAttention], about("store `qkv`: how each recorded layer makes rows; otherwise empty")
    ] = field(default_factory=list)
    prefill_chunk: Annotated[
        Positive | None, about("tokens of a prompt that went through the model at a time, if it had more")
    ] = None
    top: Annotated[Positive | None, about("store `topk`: most weights stored of a row")] = None
    head_numbers: Annotated[list[Number], about("where only some query heads were recorded, which of the model's")] = (
        field(default_factory=list)
    )
    n_heads: Annotated[Positive | None, about("with `head_numbers`: query heads of the model")] = None
    query_stride: Annotated[Positive, about("every how many-th row was recorded: with 4, positions 3, 7, 11, ...")] = 1
    vector_dtype: Annotated[
        VectorType,
        about("numbers of `states` and `hidden` on disk; `bfloat16`: its two bytes, the lower first", omit=True),
    ] = "float32"
    prompts: Annotated[list[PromptRecord], about("prompt of each sequence")] = field(default_factory=list)
    device: Annotated[str | None, about("device that computed it")] = "cpu"
    seed: Annotated[int | None, about("seed of the sampling")] = None
    sampling: Annotated[SamplingRecord, about("how the next token was chosen")] = SamplingRecord()
    tokenizer: Annotated[str | None, about("class of the tokenizer")] = None
    versions: Annotated[dict[str, str], about("versions of what recorded it")] = field(default_factory=dict)
    command: Annotated[str | None, about("command line that recorded it")] = None
    assumed: Annotated[
        list[str], about("of an import: what neither the file nor the user said, and was assumed", omit=True)
    ] = field(default_factory=list)
    other_layers: Annotated[
        dict[str, str],
        about("kind of each layer of the model that has no attention, so no cache to evict, by its number", omit=True),
    ] = field(default_factory=dict)
    rows_from: Annotated[
        Literal["module"] | None,
        about(
            "`module`: the rows are those that the model's attention modules return; otherwise they are computed from "
            "queries and keys",
            omit=True,
        ),
    ] = None
    chunk_size: Annotated[
        list[Positive | None],
        about("of each recorded layer, in chunks of how many tokens it attends; empty if none does", omit=True),
    ] = field(default_factory=list)
    shared_cache: Annotated[
        dict[str, Number],
        about("for each recorded layer that reads the cache of an earlier one, by its number: that layer", omit=True),
    ] = field(default_factory=dict)
    latent_size: Annotated[
        Positive | None,
        about("where the heads of a layer share one cached vector per token: its numbers, the most", omit=True),
    ] = None
    sink_rows: Annotated[
        Literal["after", "before"] | None,
        about(
            "of a model with learned sinks: `after`: rows are what a sink leaves, so that they sum to less than one; "
            "`before`: rows are divided by their sum, and what a sink then takes is unknown",
            omit=True,
        ),
    ] = None
    indexed: Annotated[
        bool,
        about("whether a learned index of the model chooses the keys that a query sees: those with weight", omit=True),
    ] = False
    layer_heads: Annotated[
        list[LayerHeads],
        about("heads of each recorded layer and their sizes, where layers differ; otherwise empty", omit=True),
    ] = field(default_factory=list)
    value_dim: Annotated[
        Number | None, about("size of a value of all layers, where it is not that of a key", omit=True)
    ] = None
    rotary: Annotated[
        list[RotaryRecord],
        about("stores with vectors: rotary embedding of the recorded layers; empty if a layer has none", omit=True),
    ] = field(default_factory=list)
    special_tokens: Annotated[
        list[Number] | None, about("ids that the tokenizer calls special; recordings only", omit=True)
    ] = None

    @property
    def whole(self) -> bool:
        """Whether every layer of the model that has attention was recorded."""
        return len(self.layers) + len(self.other_layers) == self.n_layers

    @property
    def store(self) -> str:
        """The store in `STORES` that fits its rows and vectors; an import may have only some of the vectors."""
        if TOPK in self.stored:
            return TOPK
        if MAPS not in self.stored:
            return QKV
        return MAPS_AND_VECTORS if any(f"vectors:{name}" in self.stored for name in VECTORS) else MAPS

    @property
    def derived(self) -> list[str]:
        """Signals that are not stored but can be recomputed from stored vectors."""
        return [
            signal
            for signal, vectors in DERIVED.items()
            if signal not in self.stored
            and all(f"vectors:{name}" in self.stored for name in vectors)
            and (signal != "maps" or len(self.attention) == len(self.layers))
            and (signal != "queries" or not self.head_numbers)  # the mean is over all heads of the model
        ]

    @property
    def digest(self) -> str:
        """SHA-256 of all that decides what a replay gives, without the lengths; in the metadata of every file."""
        return seal_of(self._deciding)

    @property
    def _deciding(self) -> JsonDict:
        facts = plain(self)
        for name in PROVENANCE:
            del facts[name]
        model = plain(self.model)
        model.pop("config", None)
        prompts = [prompt.sha256 for prompt in self.prompts]
        return {**facts, "model": model, "prompts": prompts}

    def chunks_of(self, layers: Sequence[int]) -> tuple[int | None, ...]:
        """Return the size of the chunks in which some recorded layers attend; empty if none of the trace does."""
        return tuple(self.chunk_size[self.layers.index(layer)] for layer in layers) if self.chunk_size else ()

    def heads_of(self, layer: int) -> LayerHeads:
        """Return the heads of a recorded layer."""
        if self.layer_heads:
            return self.layer_heads[self.layers.index(layer)]
        return LayerHeads(self.heads, self.kv_heads, self.head_dim, self.value_dim)

    def rotary_of(self, layer: int) -> RotaryRecord:
        """Return the rotary embedding of a recorded layer; only where `rotary` has it."""
        return next(record for record in self.rotary if layer in record.layers)

    def attention_of(self, layer: int) -> LayerAttention:
        """Return how a recorded layer turns queries and keys into weights; only for store ``qkv``."""
        return self.attention[self.layers.index(layer)]


@dataclass(frozen=True, kw_only=True)
class TraceRecord:
    """Everything in ``trace.json`` of a finished trace."""

    kind: Annotated[Literal["kvscope-trace"], about("kind of the folder")] = KIND
    schema: Annotated[Positive, about("version of the format")] = SCHEMA_VERSION
    kvscope: Annotated[str | None, about("version of kvscope that wrote it")] = None
    header: Annotated[TraceHeader, about("the part that is known before the recording starts")]
    complete: Annotated[bool, about("false while the trace is being written")] = True
    created: Annotated[str, about("when it was finished, ISO 8601 in UTC")]
    sequences: Annotated[list[SequenceRecord], about("lengths of each sequence")]
    loss: Annotated[StorageError | None, about("store `topk`: mass outside the stored weights", omit=True)] = None
    bytes: Annotated[Number | None, about("bytes of all Parquet files")] = None
    sizes: Annotated[dict[str, Number], about("bytes of each Parquet file")]
    checksums: Annotated[dict[str, Checksum], about("SHA-256 of each Parquet file")]

    @property
    def storage_error(self) -> StorageError | None:
        """How far rebuilt rows can be from the recorded ones; None where every row is stored."""
        return self.loss

    @property
    def identity(self) -> str:
        """SHA-256 over the checksums of the files and what decides in the header: equal for the same content.

        Before version 6 it is over the checksums alone.
        """
        if self.schema < SEALED_SINCE:
            return hashlib.sha256(json.dumps(self.checksums, sort_keys=True).encode()).hexdigest()
        lengths = [plain(replace(item, images=[])) for item in self.sequences]
        images = [[image.facts for image in item.images] for item in self.sequences]
        if any(images):
            return seal_of(
                {"checksums": self.checksums, "header": self.header.digest, "sequences": lengths, "images": images}
            )
        return seal_of({"checksums": self.checksums, "header": self.header.digest, "sequences": lengths})

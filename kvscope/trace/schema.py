"""The files of a trace: columns, types, units, and what changed from version to version.

A trace is a folder: ``trace.json`` says what it is, Parquet files hold the data, one file per layer. A change of this
module is a change of the format: raise `SCHEMA_VERSION` and add a line to `HISTORY`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from kvscope.errors import TraceError

KIND = "kvscope-trace"
HEADER = "trace.json"
MEMBERS = r"trace\.json|tokens\.parquet|(attention|keys|queries|states|hidden)/layer=\d+\.parquet"  # and nothing else
SCHEMA_VERSION = 3
OLDEST_VERSION = 1  # that can still be read
HISTORY = {
    1: "first version: store maps (attention rows, norms, similarities, mean queries)",
    2: "store qkv: vectors alone, from which rows are recomputed as `attention` in `trace.json` says; `prefill_chunk`",
    3: "layer inputs in `hidden`; with them a few of the model's weights in `trace.json`, by which it is known again",
}


def _column(name: str, kind: pa.DataType, about: str) -> pa.Field:
    return pa.field(name, kind, nullable=False, metadata={"about": about})


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("item", kind, nullable=False))


TOKENS = pa.schema(
    [
        _column("sequence", pa.int32(), "number of the sequence, from 0"),
        _column("position", pa.int32(), "position in the sequence, from 0"),
        _column("token_id", pa.int64(), "id in the model's vocabulary; -1 where unknown (imported maps)"),
        _column("text", pa.string(), "what the token adds to the text"),
        _column("is_prompt", pa.bool_(), "whether the token belongs to the prompt"),
        _column("logprob", pa.float32(), "log-probability of the token under the full cache, nats; NaN for the first"),
        _column(
            "entropy",
            pa.float32(),
            "entropy of the distribution that the token was drawn from, nats; NaN for the first",
        ),
    ]
)
ATTENTION = pa.schema(
    [
        _column("sequence", pa.int32(), "number of the sequence"),
        _column("layer", pa.int32(), "layer of the model, from 0"),
        _column("head", pa.int32(), "query head"),
        _column("position", pa.int32(), "position of the query"),
        _column(
            "row_sum", pa.float32(), "sum of the weights before rounding; below 1 where a learned sink takes a share"
        ),
        _column("weights", _list(pa.float16()), "attention after softmax on keys 0..position"),
    ]
)
KEYS = pa.schema(
    [
        _column("sequence", pa.int32(), "number of the sequence"),
        _column("layer", pa.int32(), "layer of the model"),
        _column("kv_head", pa.int32(), "key/value head"),
        _column("position", pa.int32(), "position of the key"),
        _column("value_l1", pa.float32(), "L1 norm of the value; NaN where not stored"),
        _column("value_l2", pa.float32(), "L2 norm of the value; NaN where not stored"),
        _column("key_l2", pa.float32(), "L2 norm of the key; NaN where not stored"),
        _column("similarity", _list(pa.float16()), "cosine with each earlier key, as cached; empty where not stored"),
    ]
)
QUERIES = pa.schema(
    [
        _column("sequence", pa.int32(), "number of the sequence"),
        _column("layer", pa.int32(), "layer of the model"),
        _column("position", pa.int32(), "position of the query"),
        _column(
            "mean_query", _list(pa.float32()), "query after rotary embedding, mean over the query heads, D numbers"
        ),
    ]
)
STATES = pa.schema(
    [
        _column("sequence", pa.int32(), "number of the sequence"),
        _column("layer", pa.int32(), "layer of the model"),
        _column("position", pa.int32(), "position of the token"),
        _column(
            "queries",
            _list(pa.float32()),
            "queries of all heads, after rotary embedding, H x D numbers, exactly; empty where not stored",
        ),
        _column(
            "keys",
            _list(pa.float32()),
            "keys of all key/value heads, as cached, G x D numbers, exactly; empty where not stored",
        ),
        _column(
            "values",
            _list(pa.float32()),
            "values of all key/value heads, as cached, G x D numbers, exactly; empty where not stored",
        ),
    ]
)
HIDDEN = pa.schema(
    [
        _column("sequence", pa.int32(), "number of the sequence"),
        _column("layer", pa.int32(), "layer of the model"),
        _column("position", pa.int32(), "position of the token"),
        _column("hidden", _list(pa.float32()), "input of the layer's attention, exactly"),
    ]
)
Which = Literal["queries", "keys", "values"]
VECTORS: tuple[Which, ...] = ("queries", "keys", "values")
MAPS, MAPS_AND_VECTORS, QKV = "maps", "maps+vectors", "qkv"
_OF_MAPS = ("maps", "value_l1", "value_l2", "key_l2", "similarity", "queries")
_OF_VECTORS = tuple(f"vectors:{name}" for name in VECTORS)
# What a recording may keep, and the signals that it then holds.
STORES = {MAPS: _OF_MAPS, MAPS_AND_VECTORS: (*_OF_MAPS, *_OF_VECTORS), QKV: _OF_VECTORS}
# A signal that is not stored, and the vectors that it follows from.
DERIVED = {
    "maps": ("queries", "keys"),
    "value_l1": ("values",),
    "value_l2": ("values",),
    "key_l2": ("keys",),
    "similarity": ("keys",),
    "queries": ("queries",),
}
FILES = {
    "tokens.parquet": ("one token of one sequence", TOKENS),
    "attention/layer=NNN.parquet": ("one query of one head", ATTENTION),
    "keys/layer=NNN.parquet": ("one key of one key/value head", KEYS),
    "queries/layer=NNN.parquet": ("one query of one layer", QUERIES),
    "states/layer=NNN.parquet": ("one token of one layer (stores maps+vectors and qkv, or imported vectors)", STATES),
    "hidden/layer=NNN.parquet": ("one token of one layer (recorded with `--hidden`)", HIDDEN),
}


def layer_file(kind: str, layer: int) -> str:
    """Return the path of a layer's file inside the trace: ``attention/layer=003.parquet``."""
    return f"{kind}/layer={layer:03d}.parquet"


@dataclass(frozen=True)
class LayerAttention:
    """How a layer turns queries and keys into weights: scale, cap, mask, softmax with the sinks, which are left out.

    Attributes
    ----------
    scaling : float
        Factor of the logits.
    softcap : float or None
        Cap of the scaled logits: ``softcap * tanh(logits / softcap)``.
    sliding_window : int or None
        Keys that a query sees at most, itself included.
    sinks : list of float or None
        Learned sink logit of each query head.
    mask : str
        ``causal``: a query sees itself and earlier keys, within the window.
    """

    scaling: float
    softcap: float | None = None
    sliding_window: int | None = None
    sinks: list[float] | None = None
    mask: str = "causal"


@dataclass(frozen=True)
class TraceHeader:
    """What ``trace.json`` says of a trace, apart from what is known only at its end.

    Attributes
    ----------
    source : str
        ``model`` or ``import``.
    protocol : str
        ``generated``, ``forced`` (the continuation was given) or ``import``.
    model : dict
        ``id``, ``revision``, ``config``, ``dtype``, ``attention``; ``weights``, a sample of them, beside `hidden`.
    layers : list of int
        Recorded layers; `layer_types` (``full`` or ``sliding``) and `sliding_window` (keys, or None) go with them.
    n_layers, heads, kv_heads, head_dim : int
        ``L`` of the model, ``H``, ``G``, ``D``.
    learned_sinks : bool
        Whether rows sum to less than one because a learned sink takes part in the softmax.
    softcap : float or None
        Cap of the attention logits.
    stored : list of str
        Signals: ``maps``, ``value_l1``, ``value_l2``, ``key_l2``, ``similarity``, ``queries``, ``vectors:keys``, ...,
        ``hidden``.
    attention : list of LayerAttention
        Store ``qkv``: of each recorded layer, in the order of `layers`. Empty where rows are stored.
    prefill_chunk : int or None
        Tokens of a prompt that went through the model at a time, where a prompt had more than that.
    prompts : list of dict
        ``file``, ``sha256`` and ``text`` of each prompt.
    """

    source: str
    protocol: str
    model: dict[str, Any]
    layers: list[int]
    n_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    layer_types: list[str]
    sliding_window: list[int | None]
    learned_sinks: bool = False
    softcap: float | None = None
    stored: list[str] = field(default_factory=lambda: ["maps"])
    attention: list[LayerAttention] = field(default_factory=list)
    prefill_chunk: int | None = None
    prompts: list[dict[str, Any]] = field(default_factory=list)
    device: str = "cpu"
    seed: int | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None

    @property
    def store(self) -> str:
        """Which of `STORES` it is, as far as rows and vectors go; an import may hold some vectors only."""
        if "maps" not in self.stored:
            return QKV
        return MAPS_AND_VECTORS if any(name in self.stored for name in _OF_VECTORS) else MAPS

    @property
    def derived(self) -> list[str]:
        """Signals that are not stored and follow from the vectors that are."""
        return [
            signal
            for signal, vectors in DERIVED.items()
            if signal not in self.stored
            and all(f"vectors:{name}" in self.stored for name in vectors)
            and (signal != "maps" or len(self.attention) == len(self.layers))
        ]

    def attention_of(self, layer: int) -> LayerAttention:
        """Return how a recorded layer turns queries and keys into weights, where the header says so."""
        return self.attention[self.layers.index(layer)]

    def to_json(self) -> dict[str, Any]:
        """Return the header as plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any], path: Path) -> TraceHeader:
        """Return the header in the content of ``trace.json``.

        Raises
        ------
        TraceError
            If a field is missing: the file was edited or is damaged.
        """
        names = {item.name for item in fields(cls)}
        try:
            given = {name: value for name, value in data.items() if name in names}
            given["attention"] = [LayerAttention(**facts) for facts in data.get("attention", [])]
            return cls(**given)
        except TypeError as error:
            raise TraceError(
                f"{path / HEADER} is damaged: {error}".replace("TraceHeader.__init__() ", ""), "Record the trace again."
            ) from error


def read_header(path: Path) -> dict[str, Any]:
    """Return the content of ``trace.json``, of a whole trace of this version.

    Raises
    ------
    TraceError
        Each with its own message: nothing there, not a trace, older, newer, incomplete, damaged.
    """
    file = path / HEADER
    if not path.exists():
        unfinished = path.with_name(path.name + ".incomplete")
        if unfinished.exists():
            raise TraceError(f"trace {path} is incomplete: recording stopped before its end", _again(unfinished))
        raise TraceError(f"no trace at {path}", "Record one: kvscope trace --model demo prompt.txt")
    if not file.is_file():
        raise TraceError(f"{path} is not a kvscope trace: it has no {HEADER}", "Name a folder under traces/.")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise TraceError(
            f"trace {path} is damaged: {HEADER} is no JSON ({error})", "Record the trace again."
        ) from error
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise TraceError(f"{path} is not a kvscope trace: {HEADER} is of another kind", "Name a folder under traces/.")
    version = data.get("schema")
    if not isinstance(version, int) or version < OLDEST_VERSION:
        raise TraceError(f"trace {path} has the older format {version}", "Record it again with this kvscope.")
    if version > SCHEMA_VERSION:
        raise TraceError(
            f"trace {path} has format {version}, newer than this kvscope reads ({SCHEMA_VERSION})", "Update kvscope."
        )
    if not data.get("complete"):
        raise TraceError(f"trace {path} is incomplete: recording stopped before its end", _again(path))
    return data


def _again(path: Path) -> str:
    return f"Record it again; {path} can be removed."


def estimate_bytes(
    *,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    lengths: Sequence[int],
    stored: Collection[str] = STORES[MAPS],
    number_bytes: float = 4,
    hidden: int = 0,
) -> int:
    """Return about how many bytes a trace of these sizes takes on disk.

    Parameters
    ----------
    stored : collection of str
        Its signals, as in the header.
    number_bytes : float
        Of one number of a stored vector: about 2 where the model's dtype has 16 bits.
    hidden : int
        Numbers of a layer's input, where these are stored.
    """
    vectors = [name for name in VECTORS if f"vectors:{name}" in stored]
    numbers = sum(head_dim * (heads if name == "queries" else kv_heads) for name in vectors)
    norms = {"value_l1", "value_l2", "key_l2", "similarity"} & set(stored)
    total = 0.0
    for length in lengths:
        pairs = length * (length + 1) // 2
        total += layers * heads * (2 * pairs + 24 * length) if "maps" in stored else 0
        total += layers * kv_heads * (28 * length + (2 * pairs if "similarity" in stored else 0)) if norms else 0
        total += layers * length * (4 * head_dim + 12) if "queries" in stored else 0
        total += layers * length * (number_bytes * numbers + 12) if vectors else 0
        total += layers * length * (number_bytes * hidden + 12) if "hidden" in stored else 0
        total += 32 * length
    return int(total) + 4096 * (1 + 3 * layers)


def describe() -> str:
    """Return the documentation of every file and column, as Markdown."""
    lines = [
        "# The trace format",
        "",
        f"Version {SCHEMA_VERSION}. A trace is a folder with `{HEADER}` and these Parquet files.",
        "",
    ]
    for name, (row, schema) in FILES.items():
        lines += [f"## `{name}`", "", f"One row is {row}.", "", "| column | type | what it is |", "|---|---|---|"]
        for column in schema:
            kind = str(column.type).replace("item: ", "").replace(" not null", "")
            lines.append(f"| `{column.name}` | `{kind}` | {column.metadata[b'about'].decode()} |")
        lines.append("")
    lines += ["## History", "", *(f"- {version}: {what}" for version, what in HISTORY.items()), ""]
    return "\n".join(lines)

"""What a trace is: its stores, its header, and what changed from version to version.

A trace is a folder: ``trace.json`` says what it is, Parquet files hold the data, one file per layer. A change of this
module or of `kvscope.trace.columns` is a change of the format: raise `SCHEMA_VERSION` and add a line to `HISTORY`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from kvscope.core.errors import TraceError, UsageError
from kvscope.trace.columns import FILES
from kvscope.trace.loss import describe_bounds

KIND = "kvscope-trace"
HEADER = "trace.json"
_FOLDERS = "|".join(name.partition("/")[0] for name in FILES if "/" in name)
MEMBERS = rf"trace\.json|tokens\.parquet|({_FOLDERS})/layer=\d+\.parquet"  # and nothing else
SCHEMA_VERSION = 4
OLDEST_VERSION = 1  # that can still be read
HISTORY = {
    1: "first version: store maps (attention rows, norms, similarities, mean queries)",
    2: "store qkv: vectors alone, from which rows are recomputed as `attention` in `trace.json` says; `prefill_chunk`",
    3: "layer inputs in `hidden`; with them a few of the model's weights in `trace.json`, by which it is known again",
    4: "store topk: the heaviest keys of every row and sums of columns; traces of some heads, or of every n-th row",
}

Which = Literal["queries", "keys", "values"]
VECTORS: tuple[Which, ...] = ("queries", "keys", "values")
MAPS, MAPS_AND_VECTORS, QKV, TOPK = "maps", "maps+vectors", "qkv", "topk"
TOP = 256  # weights of a row that store topk keeps, unless told
STRETCH = 256  # positions over which it sums columns; a stretch also ends where a prompt or a sequence does
_OF_MAPS = ("maps", "value_l1", "value_l2", "key_l2", "similarity", "queries")
_OF_VECTORS = tuple(f"vectors:{name}" for name in VECTORS)
# What a recording may keep, and the signals that it then holds.
STORES = {
    MAPS: _OF_MAPS,
    MAPS_AND_VECTORS: (*_OF_MAPS, *_OF_VECTORS),
    QKV: _OF_VECTORS,
    TOPK: (TOPK, "value_l1", "value_l2", "key_l2", "queries"),
}
# A signal that is not stored, and the vectors that it follows from.
DERIVED = {
    "maps": ("queries", "keys"),
    "value_l1": ("values",),
    "value_l2": ("values",),
    "key_l2": ("keys",),
    "similarity": ("keys",),
    "queries": ("queries",),
}


def parse_store(text: str) -> tuple[str, int | None]:
    """Return the name of a store and how many weights of a row it keeps: ``topk:64``; None is all of them.

    Raises
    ------
    UsageError
        If it is unknown, or the number is none.
    """
    name, colon, count = text.partition(":")
    if name not in STORES or (colon and name != TOPK):
        raise UsageError(f"store {text!r} is unknown", f"Use one of: {', '.join(STORES)}, topk:K.")
    if name != TOPK:
        return name, None
    if colon and (not count.isdecimal() or int(count) < 1):
        raise UsageError(f"store {text!r}: {count!r} is no number of weights", f"Write topk:{TOP}, or any from 1 up.")
    return name, int(count) if colon else TOP


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
    top : int or None
        Store ``topk``: weights of a row that are kept at most.
    head_numbers : list of int
        Where only some query heads were recorded, which of the model's: here they are numbered from 0. `heads` and
        `kv_heads` count what was recorded; `n_heads` counts the model's query heads.
    query_stride : int
        Every how many-th row of attention was recorded: with 4, those of positions 3, 7, 11, ...
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
    top: int | None = None
    head_numbers: list[int] = field(default_factory=list)
    n_heads: int | None = None
    query_stride: int = 1
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
        if TOPK in self.stored:
            return TOPK
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
            and (signal != "queries" or not self.head_numbers)  # the mean is over all heads of the model
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
    top: int = TOP,
    query_stride: int = 1,
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
    top, query_stride : int
        As in the header.
    """
    vectors = [name for name in VECTORS if f"vectors:{name}" in stored]
    numbers = sum(head_dim * (heads if name == "queries" else kv_heads) for name in vectors)
    norms = {"value_l1", "value_l2", "key_l2", "similarity"} & set(stored)
    total = 0.0
    for length in lengths:
        pairs = length * (length + 1) // 2
        total += layers * heads * (2 * pairs + 24 * length) / query_stride if "maps" in stored else 0
        total += layers * heads * _topk_bytes(length, top) if TOPK in stored else 0
        total += layers * kv_heads * (28 * length + (2 * pairs if "similarity" in stored else 0)) if norms else 0
        total += layers * length * (4 * head_dim + 12) if "queries" in stored else 0
        total += layers * length * (number_bytes * numbers + 12) if vectors else 0
        total += layers * length * (number_bytes * hidden + 12) if "hidden" in stored else 0
        total += 32 * length
    return int(total) + 4096 * (1 + 3 * layers)


def _topk_bytes(length: int, top: int) -> float:
    """Return about how many bytes a head takes: a weight 2, its position 1, a sum of a column 4 and 4 outside."""
    kept = sum(min(top, position + 1) for position in range(length))
    return 3 * kept + 16 * length + 8 * length * (length / STRETCH + 1) / 2


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
    lines += describe_bounds()
    lines += ["## History", "", *(f"- {version}: {what}" for version, what in HISTORY.items()), ""]
    return "\n".join(lines)

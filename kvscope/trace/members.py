"""Which files a trace has, how many rows each, and what each says of itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from kvscope.trace.columns import BY_VECTORS, FILES, layer_file
from kvscope.trace.record import SequenceRecord, TraceHeader
from kvscope.trace.schema import TOPK
from kvscope.trace.stretches import count_stretches

TOKENS_FILE = "tokens.parquet"
ABOUT = b"kvscope"  # key in the metadata of a Parquet file; its value names trace, kind and layer
# Kind of a file of one layer -> signals that it has; it is written where one of them is stored.
SIGNALS: dict[str, tuple[str, ...]] = {
    "attention": ("maps",),
    "topk": (TOPK,),
    "columns": (TOPK,),
    "keys": ("value_l1", "value_l2", "key_l2", "similarity"),
    "outputs": ("value_out_l1",),
    "readings": ("reconstruction",),
    "queries": ("queries",),
    "states": ("vectors:queries", "vectors:keys", "vectors:values"),
    "hidden": ("hidden",),
}


@dataclass(frozen=True)
class Member:
    """One file of a trace: its kind and, unless it is that of the tokens, its layer."""

    kind: str
    layer: int | None = None

    def schema(self, header: TraceHeader) -> pa.Schema:
        """Return the columns of the file; those with vectors are of the trace's type."""
        if self.kind in BY_VECTORS:
            return BY_VECTORS[self.kind][header.vector_dtype]
        return FILES[TOKENS_FILE if self.layer is None else f"{self.kind}/layer=NNN.parquet"][1]

    def rows(self, header: TraceHeader, sequences: Sequence[SequenceRecord]) -> int:
        """Return how many rows the file has."""
        lengths = [item.length for item in sequences]
        heads = None if self.layer is None else header.heads_of(self.layer)
        if heads is None or self.kind in ("queries", "states", "hidden"):
            return sum(lengths)
        if self.kind == "attention":
            return heads.heads * sum(length // header.query_stride for length in lengths)
        if self.kind == "columns":
            return heads.heads * sum(count_stretches(item.prompt, item.length) for item in sequences)
        return (heads.heads if self.kind == "topk" else heads.kv_heads) * sum(lengths)

    def about(self, header: TraceHeader) -> dict[bytes, bytes]:
        """Return the metadata by which the file is known: digest of the header, kind, layer."""
        text = json.dumps({"trace": header.digest, "kind": self.kind, "layer": self.layer})
        return {ABOUT: text.encode()}


def members(header: TraceHeader) -> dict[str, Member]:
    """Return the files of a trace by their relative paths."""
    kinds = [kind for kind, signals in SIGNALS.items() if not set(signals).isdisjoint(header.stored)]
    files = {layer_file(kind, layer): Member(kind, layer) for kind in kinds for layer in header.layers}
    return {TOKENS_FILE: Member("tokens"), **files}


def member_of(name: str) -> Member:
    """Return the file of a relative path that `members` gives."""
    kind, _, rest = name.partition("/layer=")
    return Member(kind, int(rest.removesuffix(".parquet"))) if rest else Member("tokens")

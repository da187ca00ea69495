"""What a trace is: its files, its stores, and what changed from version to version.

A trace is a folder: ``trace.json`` says what it is, Parquet files hold the data, one file per layer. A change of this
module, of `kvscope.trace.record` or of `kvscope.trace.columns` is a change of the format: raise `SCHEMA_VERSION` and
add a line to `HISTORY`.
"""

from __future__ import annotations

from typing import Final, Literal

from kvscope.core.errors import UsageError
from kvscope.trace.columns import FILES

KIND: Final = "kvscope-trace"
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

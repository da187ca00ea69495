"""The format of a trace: its files, its stores, and the history of its versions.

A trace is a folder: ``trace.json`` describes it, Parquet files contain the data, one file per layer. A change of this
module, of `kvscope.trace.record` or of `kvscope.trace.columns` that changes files is a change of the format: raise
`SCHEMA_VERSION` and add a line to `HISTORY`.
"""

from __future__ import annotations

from typing import Final, Literal

from kvscope.core.errors import UsageError
from kvscope.trace.columns import FILES

KIND: Final = "kvscope-trace"
HEADER = "trace.json"
_FOLDERS = "|".join(name.partition("/")[0] for name in FILES if "/" in name)
MEMBERS = rf"trace\.json|tokens\.parquet|({_FOLDERS})/layer=\d+\.parquet"  # regular expression for the files of a trace
SCHEMA_VERSION = 13
OLDEST_VERSION = 1  # oldest version that can be read
SEALED_SINCE = 6  # first version whose `trace.json` has a checksum of itself, and whose files say what they are
HISTORY = {
    1: "first version: store maps (attention rows, norms, similarities, mean queries)",
    2: "store qkv: vectors alone, from which rows are recomputed as `attention` in `trace.json` says; `prefill_chunk`",
    3: "layer inputs in `hidden`; with them a few of the model's weights in `trace.json`, by which it is known again",
    4: "store topk: the heaviest keys of every row and sums of columns; traces of some heads, or of every n-th row",
    6: "a checksum of `trace.json` in it; every file says in its metadata of which trace, kind and layer it is",
    7: "vectors of 16-bit models in 16 bits, as `vector_dtype` in `trace.json` says",
    8: "layers without attention in `other_layers`; `rows_from` of rows that modules returned; `example` and `spans`",
    9: "`sink_rows`: rows before or after a learned sink takes its share; layers that attend in chunks: `chunk_size`; "
    "layers that read the cache of another: `shared_cache`; latent caches: `latent_size`; "
    "`quantization` of the model's weights, and the `base` that an adapter changes",
    10: "heads and head size of each layer where layers differ: `layer_heads`; size of values that differ: `value_dim`",
    11: "prompts with images: `images` of a sequence",
    12: "models that choose the keys they read: `indexed`; no weight of such a key is rounded to zero",
    13: "`rotary`: how the layers of a trace with vectors turn queries and keys by their positions; "
    "norms of values after the output projection: `outputs`; a second reading of prompts: `readings`; "
    "what the tokenizer calls special: `special_tokens`",
}

Which = Literal["queries", "keys", "values"]
VECTORS: tuple[Which, ...] = ("queries", "keys", "values")
MAPS, MAPS_AND_VECTORS, QKV, TOPK = "maps", "maps+vectors", "qkv", "topk"
AUTO = "auto"  # maps+vectors where the trace is small, otherwise maps: chosen before a recording, never in a header
TOP = 256  # default number of weights per row in store topk
STRETCH = 256  # rows over which store topk sums columns; a stretch also ends with the prompt and with the sequence
_OF_MAPS = ("maps", "value_l1", "value_l2", "key_l2", "similarity", "queries")
_OF_VECTORS = tuple(f"vectors:{name}" for name in VECTORS)
# Store -> signals that a recording contains.
STORES = {
    MAPS: _OF_MAPS,
    MAPS_AND_VECTORS: (*_OF_MAPS, *_OF_VECTORS),
    QKV: _OF_VECTORS,
    TOPK: (TOPK, "value_l1", "value_l2", "key_l2", "queries"),
}
# Signal -> vectors from which it is recomputed if it is not stored.
DERIVED: dict[str, tuple[str, ...]] = {
    "maps": ("queries", "keys"),
    "value_l1": ("values",),
    "value_l2": ("values",),
    "key_l2": ("keys",),
    "similarity": ("keys",),
    "queries": ("queries",),
}
SIGNALS = frozenset(
    (MAPS, TOPK, "hidden", "value_out_l1", "reconstruction", *DERIVED, *_OF_VECTORS)
)  # all that `stored` may name


def parse_store(text: str) -> tuple[str, int | None]:
    """Return the name of a store and the number of weights per row: ``topk`` and 64 for ``topk:64``, None for all.

    Raises
    ------
    UsageError
        If the store is unknown, or the number is not an integer from 1 up.
    """
    name, colon, count = text.partition(":")
    if name not in STORES or (colon and name != TOPK):
        raise UsageError(f"store {text!r} is unknown", f"Use one of: {AUTO}, {', '.join(STORES)}, topk:K.")
    if name != TOPK:
        return name, None
    if colon and (not count.isdecimal() or int(count) < 1):
        raise UsageError(
            f"store {text!r}: {count!r} is not a number of weights", f"Use a number from 1 up: topk:{TOP}."
        )
    return name, int(count) if colon else TOP

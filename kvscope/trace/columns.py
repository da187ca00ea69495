"""The Parquet files of a trace: what one row is, and the name, type and meaning of every column.

A change of a column is a change of the format: see `kvscope.trace.schema`.
"""

from __future__ import annotations

from typing import Final, Literal

import pyarrow as pa

VectorType = Literal["float32", "float16", "bfloat16"]


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
OUTPUTS = pa.schema(
    [
        _column("sequence", pa.int32(), "number of the sequence"),
        _column("layer", pa.int32(), "layer of the model"),
        _column("kv_head", pa.int32(), "key/value head"),
        _column("position", pa.int32(), "position of the key"),
        _column(
            "value_out_l1",
            pa.float32(),
            "L1 norm of the value after the output projection, mean over the query heads of the group",
        ),
    ]
)
READINGS = pa.schema(
    [
        _column("sequence", pa.int32(), "number of the sequence"),
        _column("layer", pa.int32(), "layer of the model"),
        _column("kv_head", pa.int32(), "key/value head"),
        _column("position", pa.int32(), "position of the key"),
        _column(
            "reconstruction",
            pa.float32(),
            "largest weight that a query of the second reading gives the key; 0 after the prompt",
        ),
    ]
)
# Type of a trace's vectors -> type of their numbers on disk.
NUMBERS: Final[dict[VectorType, pa.DataType]] = {
    "float32": pa.float32(),
    "float16": pa.float16(),
    "bfloat16": pa.binary(2),  # its two bytes, the lower first; a Parquet integer has at least four
}


def _states(number: pa.DataType) -> pa.Schema:
    return pa.schema(
        [
            _column("sequence", pa.int32(), "number of the sequence"),
            _column("layer", pa.int32(), "layer of the model"),
            _column("position", pa.int32(), "position of the token"),
            _column(
                "queries",
                _list(number),
                "queries of all heads, after rotary embedding, H x D numbers, exactly; empty where not stored",
            ),
            _column(
                "keys",
                _list(number),
                "keys of all key/value heads, as cached, G x D numbers, exactly; empty where not stored",
            ),
            _column(
                "values",
                _list(number),
                "values of all key/value heads, as cached, G x D numbers, exactly; empty where not stored",
            ),
        ]
    )


def _hidden(number: pa.DataType) -> pa.Schema:
    return pa.schema(
        [
            _column("sequence", pa.int32(), "number of the sequence"),
            _column("layer", pa.int32(), "layer of the model"),
            _column("position", pa.int32(), "position of the token"),
            _column("hidden", _list(number), "input of the layer's attention, exactly"),
        ]
    )


# Files with vectors, by the type of the trace's vectors.
STATES = {kind: _states(number) for kind, number in NUMBERS.items()}
HIDDEN = {kind: _hidden(number) for kind, number in NUMBERS.items()}
BY_VECTORS = {"states": STATES, "hidden": HIDDEN}
TOP = pa.schema(
    [
        _column("sequence", pa.int32(), "number of the sequence"),
        _column("layer", pa.int32(), "layer of the model"),
        _column("head", pa.int32(), "query head"),
        _column("position", pa.int32(), "position of the query"),
        _column("row_sum", pa.float32(), "sum of all weights of the row, as in `attention`"),
        _column("residual", pa.float32(), "sum of the weights that are not stored"),
        _column(
            "log_sum_exp",
            pa.float32(),
            "natural logarithm of the sum of exp(logit), learned sink included: logit = ln(weight) + log_sum_exp",
        ),
        _column("keys", _list(pa.int32()), "positions of the heaviest keys, ascending"),
        _column("weights", _list(pa.float16()), "attention after softmax on these keys"),
    ]
)
COLUMNS = pa.schema(
    [
        _column("sequence", pa.int32(), "number of the sequence"),
        _column("layer", pa.int32(), "layer of the model"),
        _column("head", pa.int32(), "query head"),
        _column("position", pa.int32(), "last of the queries that are summed; the first follows the one before"),
        _column("sums", _list(pa.float32()), "sum of the weights of these queries on each key 0..position, exactly"),
        _column("outside", _list(pa.float32()), "the part of it that is not stored in `topk`"),
    ]
)
FILES = {
    "tokens.parquet": ("one token of one sequence", TOKENS),
    "attention/layer=NNN.parquet": ("one query of one head (stores maps and maps+vectors)", ATTENTION),
    "topk/layer=NNN.parquet": ("one query of one head (store topk)", TOP),
    "columns/layer=NNN.parquet": ("one stretch of queries of one head (store topk)", COLUMNS),
    "keys/layer=NNN.parquet": ("one key of one key/value head", KEYS),
    "outputs/layer=NNN.parquet": ("one key of one key/value head (recorded with `--outputs`)", OUTPUTS),
    "readings/layer=NNN.parquet": ("one key of one key/value head (recorded with `--reread`)", READINGS),
    "queries/layer=NNN.parquet": ("one query of one layer", QUERIES),
    "states/layer=NNN.parquet": (
        "one token of one layer (stores maps+vectors and qkv, or imported vectors), in the type `vector_dtype`",
        STATES["float32"],
    ),
    "hidden/layer=NNN.parquet": (
        "one token of one layer (recorded with `--hidden`), in the type `vector_dtype`",
        HIDDEN["float32"],
    ),
}


def layer_file(kind: str, layer: int) -> str:
    """Return the path of a layer's file inside the trace: ``attention/layer=003.parquet``."""
    return f"{kind}/layer={layer:03d}.parquet"

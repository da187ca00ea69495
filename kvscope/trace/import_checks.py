"""Check imported arrays: their shapes, and every row of attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from kvscope.core.errors import TraceError, UsageError
from kvscope.trace.blocks import Array
from kvscope.trace.import_axes import PER_KEY, PER_QUERY
from kvscope.trace.row_checks import faults_of_sums
from kvscope.trace.schema import VECTORS

ABOVE_TOLERANCE = 1e-6  # largest weight above the diagonal that counts as zero
LARGEST = float(np.finfo(np.float32).max) / 2**16  # so that norms are finite too
OF_KEYS = (*PER_KEY, "keys", "values")  # arrays that have the number of key/value heads
BLOCK = 256  # rows checked at a time


def check_arrays(sequences: Sequence[Mapping[str, Array]], kv_heads: int | None, learned_sinks: bool) -> int:
    """Return ``G``; raise UsageError or TraceError for an array of a sequence with a wrong shape, or a wrong row."""
    groups = 1
    for number, arrays in enumerate(sequences):
        groups = _check_shapes(arrays, kv_heads)
        place = f"sequence {number}, " if len(sequences) > 1 else ""
        _check_rows(arrays["attention"][0], learned_sinks and "sink_mass" not in arrays, place)
    return groups


def _check_shapes(arrays: Mapping[str, Array], kv_heads: int | None) -> int:
    """Return ``G``, where no array has it `kv_heads`, or ``H``; raise UsageError for an array with the wrong shape."""
    count, layers, heads, length, keys = arrays["attention"].shape
    if length != keys or 0 in arrays["attention"].shape:
        raise UsageError(
            f"attention has the shape {list(arrays['attention'].shape)}", "Make its last two axes both T, above 0."
        )
    groups = next((arrays[name].shape[2] for name in OF_KEYS if name in arrays), kv_heads or heads)
    if kv_heads not in (None, groups):
        raise UsageError(f"the arrays have {groups} key/value heads, not {kv_heads}", "Omit --kv-heads.")
    if groups == 0 or heads % groups:
        raise UsageError(f"{heads} query heads do not share {groups} key/value heads evenly", "Make H a multiple of G.")
    for name in (*PER_KEY, *PER_QUERY, *VECTORS):
        if name in arrays:
            expected = (count, layers, heads if name in ("queries", *PER_QUERY) else groups, length)
            if arrays[name].shape[:4] != expected or arrays[name].ndim != (5 if name in VECTORS else 4):
                raise UsageError(
                    f"{name} has the shape {list(arrays[name].shape)}",
                    f"Make it begin with {list(expected)} (S, L, heads, T).",
                )
            if not (np.abs(arrays[name].astype(np.float64)) <= LARGEST).all():  # NaN too
                raise UsageError(
                    f"{name} contains values that are not finite in 32 bit",
                    "Save it without NaN, infinity and larger numbers.",
                )
            if name in PER_KEY and (arrays[name] < 0).any():
                raise UsageError(f"{name} contains a negative norm", "Save norms, which are zero or more.")
            if name in PER_QUERY and ((arrays[name] < 0) | (arrays[name] > 1)).any():
                raise UsageError(
                    f"{name} contains a share outside 0 to 1", "Save the share that the sink takes of a row."
                )
    if "tokens" in arrays and arrays["tokens"].shape != (count, length):
        raise UsageError(f"tokens has the shape {list(arrays['tokens'].shape)}", f"Make it {[count, length]} (S, T).")
    return int(groups)


def _check_rows(attention: Array, learned_sinks: bool, place: str) -> None:
    """Raise TraceError for the first row of ``[L, H, T, T]`` that is not causal attention; `place` goes before it."""
    for layer, heads in enumerate(attention):
        for head, whole in enumerate(heads):
            for first in range(0, len(whole), BLOCK):
                fault = _fault_of_rows(whole[first : first + BLOCK], first, learned_sinks)
                if fault is not None:
                    raise TraceError(
                        f"{place}layer {layer}, head {head}, {fault}",
                        "Save attention after softmax, [query, key], causal; declare learned sinks.",
                    )


def _fault_of_rows(given: Array, first: int, learned_sinks: bool) -> str | None:
    """Return what is wrong with rows ``[q, T]`` from position `first` on, None if they are causal attention."""
    with np.errstate(over="ignore"):  # what is infinite in 32 bit is reported
        rows = given.astype(np.float32)
    above = np.arange(rows.shape[1]) > first + np.arange(len(rows))[:, None]  # [q, T]
    sums = rows.sum(-1)
    faults = {
        "has a weight that is not finite": ~np.isfinite(rows).all(-1),
        "has a negative weight": (rows < 0).any(-1),
        "attends to a later key": (np.where(above, np.abs(rows), 0) > ABOVE_TOLERANCE).any(-1),
        **faults_of_sums(sums, learned_sinks),
    }
    for what, where in faults.items():
        if where.any():
            row = int(where.argmax())
            return f"row {first + row} {what} (sum {sums[row]:.4f})"
    return None

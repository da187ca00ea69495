"""Vectors of 16-bit models on disk: their exact numbers in 16 bits, and back as float32.

float16 is stored as itself. bfloat16 is the upper half of a float32, and neither NumPy nor Parquet has it: arrays have
its 16 bits as an unsigned integer, files as two bytes, since the smallest integer of Parquet has four.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kvscope.trace.blocks import Array
from kvscope.trace.columns import VectorType

Floats = NDArray[np.float32]
DTYPES: Final[dict[VectorType, type[np.generic]]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
}
_EXPONENTS = {"float16": 0x7C00, "bfloat16": 0x7F80}  # bits of the exponent: all are set in infinity and NaN


def narrowed(array: Array, kind: VectorType) -> Array:
    """Return numbers as they are stored: float32, float16, or for bfloat16 the bits as uint16.

    Parameters
    ----------
    array : array
        Floating-point numbers, or uint16 bits of bfloat16, of any shape.
    kind : {"float32", "float16", "bfloat16"}
        Type of the vectors of the trace.

    Raises
    ------
    ValueError
        If a number is not exactly a number of this 16-bit type. Of a float64, float32 takes the nearest number.
    """
    if array.dtype == DTYPES[kind]:
        return array
    if kind == "float32":
        return array.astype(np.float32)
    exact = array.astype(np.float32)
    with np.errstate(over="ignore"):
        stored = exact.astype(np.float16) if kind == "float16" else (exact.view(np.uint32) >> 16).astype(np.uint16)
    if not np.array_equal(widened(stored, kind), array, equal_nan=True):
        raise ValueError(f"have numbers that are not exact in {kind}")
    return stored


def widened(stored: Array, kind: VectorType) -> Floats:
    """Return stored numbers as float32, exactly."""
    if kind == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def as_column(numbers: Array, kind: pa.DataType) -> pa.Array:
    """Return numbers as a column of a Parquet type; uint16 as two bytes each where that is the type."""
    if not pa.types.is_fixed_size_binary(kind):
        return pa.array(numbers, kind)
    little = np.ascontiguousarray(numbers, "<u2")
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(little), [None, pa.py_buffer(little)])


def from_column(column: pa.Array) -> Array:
    """Return the numbers of a column that `as_column` made, as they are stored."""
    if not pa.types.is_fixed_size_binary(column.type):
        numbers: Array = column.to_numpy(zero_copy_only=False)
        return numbers
    whole = np.frombuffer(column.buffers()[1] or b"", "<u2")
    return whole[column.offset : column.offset + len(column)].astype(np.uint16, copy=False)


def are_finite(stored: Array, kind: VectorType) -> bool:
    """Return whether no stored number is infinite or NaN."""
    if kind == "float32":
        return bool(np.isfinite(stored).all())
    exponents = _EXPONENTS[kind]
    return not bool(((stored.view(np.uint16) & exponents) == exponents).any())

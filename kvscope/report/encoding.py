"""Encoding of values in a page: packed and deflated numbers, few digits, text without invisible characters."""

from __future__ import annotations

import base64
import math
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np

from kvscope.core.json import Json, JsonDict

SPACE = "␣"
SIGNS = {"\n": "↵", "\t": "⇥"}  # in every common font, unlike the control pictures of Unicode
HIDING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, format and bidi marks, surrogates, separators
INTEGERS = ("uint8", "int16", "uint16", "int32")  # the first that can represent all values is used
NOTHING = 2**16 - 1  # stands for NaN in packed floats
EFFORT = 6  # of deflate: 9 takes several times as long and saves 1 %


def visible(text: str) -> str:
    """Return `text` with every control character, bidi mark and invisible character shown: ``↵``, ``⟨U+202E⟩``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def visible_token(text: str) -> str:
    """Return the text of a token with its spaces shown as well."""
    return visible(text).replace(" ", SPACE)


def visible_everywhere(value: Json) -> Json:
    """Return JSON data with `visible` applied to every string, keys included."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {visible(str(key)): visible_everywhere(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [visible_everywhere(item) for item in value]
    return value


def rounded(value: float | None, digits: int = 6) -> float | None:
    """Return `value` with a number of significant digits; None for None, NaN and infinities."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.{digits}g}")


def packed(values: np.ndarray) -> JsonDict:
    """Return integers as ``{"dtype", "shape", "data"}``: little-endian, as small as they fit, deflated, in base64."""
    array = np.asarray(values)
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    dtype = next(name for name in INTEGERS if np.iinfo(name).min <= low and high <= np.iinfo(name).max)
    return _deflated(array, dtype)


def packed_floats(values: np.ndarray) -> JsonDict:
    """Return floats as 65,535 even steps from the smallest, ``low``, to the largest, ``high``; NaN is kept."""
    array = np.asarray(values, dtype=np.float64)
    there = np.isfinite(array)
    low, high = finite_range(array)
    steps = np.full(array.shape, NOTHING)
    steps[there] = np.rint((array[there] - low) * ((NOTHING - 1) / (high - low) if high > low else 0.0))
    return {"low": low, "high": high, **_deflated(steps, "uint16")}


def finite_range(values: np.ndarray) -> tuple[float, float]:
    """Return the smallest and the largest finite number; zeros where there is none."""
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def packed_halves(values: np.ndarray) -> JsonDict:
    """Return 16-bit floats unchanged: attention weights as the trace stores them."""
    return _deflated(np.asarray(values), "float16")


def unpacked(value: Mapping[str, Json]) -> np.ndarray:
    """Return the numbers of `packed`, `packed_floats` or `packed_halves`."""
    raw = zlib.decompress(base64.b64decode(str(value["data"])))
    shape = cast("list[int]", value["shape"])
    array = np.frombuffer(raw, dtype=np.dtype(str(value["dtype"])).newbyteorder("<")).reshape(shape)
    if "low" not in value:
        return array
    low, high = cast("float", value["low"]), cast("float", value["high"])
    steps = np.where(array == NOTHING, np.nan, array.astype(np.float64))
    return np.asarray(low + steps * ((high - low) / (NOTHING - 1)))


def packed_bytes(value: Mapping[str, Json]) -> int:
    """Return the size of packed numbers in the page."""
    return len(str(value["data"]))


def deflated_text(text: str) -> str:
    """Return UTF-8 text deflated, in base64."""
    return base64.b64encode(zlib.compress(text.encode("utf-8"), EFFORT)).decode("ascii")


def _deflated(array: np.ndarray, dtype: str) -> JsonDict:
    raw = np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
    data = base64.b64encode(zlib.compress(raw, EFFORT)).decode("ascii")
    return {"dtype": dtype, "shape": list(array.shape), "data": data}


def _shown(character: str) -> str:
    if unicodedata.category(character) in HIDING:
        return SIGNS.get(character, f"⟨U+{ord(character):04X}⟩")
    return character

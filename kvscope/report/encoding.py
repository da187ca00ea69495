"""Values as a page carries them: integers in base64, numbers with few digits, text in which nothing hides."""

from __future__ import annotations

import base64
import math
import unicodedata
from typing import Any

import numpy as np

SPACE = "␣"
SIGNS = {"\n": "↵", "\t": "⇥"}  # in every common font, which the control pictures of Unicode are not
HIDING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, format and bidi marks, surrogates, separators


def visible(text: str) -> str:
    """Return `text` with every control character, bidi mark and invisible character shown: ``↵``, ``⟨U+202E⟩``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def visible_token(text: str) -> str:
    """Return the text of a token with its spaces shown as well."""
    return visible(text).replace(" ", SPACE)


def visible_everywhere(value: Any) -> Any:
    """Return JSON-able data in which every string, keys included, went through `visible`."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {visible(str(key)): visible_everywhere(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [visible_everywhere(item) for item in value]
    return value


def rounded(value: float | None, digits: int = 6) -> float | None:
    """Return `value` with a number of significant digits; None for None, NaN and infinities."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{float(value):.{digits}g}")


def packed(values: np.ndarray) -> dict[str, str]:
    """Return integers as ``{"dtype", "data"}``: little-endian int16 where they fit, otherwise int32, in base64."""
    array = np.asarray(values)
    small = array.size == 0 or (array.min() >= -(2**15) and array.max() < 2**15)
    dtype = "int16" if small else "int32"
    data = np.ascontiguousarray(array, dtype=np.dtype(dtype).newbyteorder("<")).tobytes()
    return {"dtype": dtype, "data": base64.b64encode(data).decode("ascii")}


def unpacked(value: dict[str, str]) -> np.ndarray:
    """Return the integers of `packed`."""
    return np.frombuffer(base64.b64decode(value["data"]), dtype=np.dtype(value["dtype"]).newbyteorder("<"))


def packed_bytes(value: dict[str, str]) -> int:
    """Return the size of `packed` integers before base64."""
    return len(value["data"]) * 3 // 4


def _shown(character: str) -> str:
    if unicodedata.category(character) in HIDING:
        return SIGNS.get(character, f"⟨U+{ord(character):04X}⟩")
    return character

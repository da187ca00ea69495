"""A checksum inside a file of plain data: what was changed since it was written is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from kvscope.core.json import JsonDict

SEAL = "sha256"  # field with the checksum


def seal_of(data: Mapping[str, object]) -> str:
    """Return the SHA-256, in hexadecimal, of plain data without its own checksum; order and layout do not matter."""
    rest = {name: value for name, value in data.items() if name != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode("ascii")).hexdigest()


def sealed(data: JsonDict) -> JsonDict:
    """Return plain data with its checksum as the last field."""
    rest = {name: value for name, value in data.items() if name != SEAL}
    return {**rest, SEAL: seal_of(rest)}


def is_changed(data: Mapping[str, object]) -> bool:
    """Return whether plain data differs from its checksum; data without one, as of older versions, does not."""
    return SEAL in data and data[SEAL] != seal_of(data)

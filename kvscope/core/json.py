"""Plain data: what a JSON file holds, and what a page is drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None
JsonDict: TypeAlias = dict[str, Json]

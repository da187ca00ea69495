"""What learned sinks take of imported rows: rows are stored after it, where the file says how much it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from kvscope.trace.blocks import Array
from kvscope.trace.row_checks import SUM_TOLERANCE


def leave_share(arrays: dict[str, Array]) -> None:
    """Multiply rows ``[1, L, H, T, T]`` that sum to one by what ``sink_mass`` ``[1, L, H, T]`` leaves, if given."""
    if "sink_mass" in arrays:
        arrays["attention"] = arrays["attention"] * (1 - arrays["sink_mass"].astype(np.float32))[..., None]


def sink_rows(sequences: Sequence[Mapping[str, Array]], declared: bool) -> Literal["after", "before"] | None:
    """Return whether rows are those after or before learned sinks take their share; None without learned sinks.

    Parameters
    ----------
    sequences : sequence of mapping
        Arrays of each sequence, after `leave_share`.
    declared : bool
        Whether the user says that the model has learned sinks.
    """
    if any("sink_mass" in arrays for arrays in sequences):
        return "after"
    if not declared:
        return None
    least = min(float(arrays["attention"].sum(-1, dtype=np.float32).min()) for arrays in sequences)
    return "before" if least >= 1 - SUM_TOLERANCE else "after"

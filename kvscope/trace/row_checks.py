"""What every row of attention must be, whether it is imported or read from a trace."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvscope.trace.blocks import Array

SUM_TOLERANCE = 1e-2  # above the error of a half-precision softmax over thousands of keys
HALF_RELATIVE, HALF_ABSOLUTE = 2.0**-10, 2.0**-24  # above the error of a weight when it is rounded to 16 bit

Flags = NDArray[np.bool_]


def faults_of_sums(sums: Array, learned_sinks: bool) -> dict[str, Flags]:
    """Return what may be wrong with the sums of rows, and of which rows it is true.

    Parameters
    ----------
    sums : array
        Sum of each row.
    learned_sinks : bool
        Whether rows may sum to less than one.
    """
    return {
        "sums to more than one": ~(sums <= 1 + SUM_TOLERANCE),  # NaN too
        "sums to less than one": (sums < 1 - SUM_TOLERANCE) & (not learned_sinks),
        "sums to less than zero": sums < 0,
    }


def faults_of_weights(stored: Array, recorded: Array, counts: Array) -> Flags:
    """Return which rows do not have the recorded sum, up to the rounding of their weights to 16 bit.

    Parameters
    ----------
    stored, recorded : array
        Sum of the weights of each row as they are stored, and before they were rounded.
    counts : array
        Number of weights of each row.
    """
    tolerance = HALF_RELATIVE * np.abs(recorded) + HALF_ABSOLUTE * counts
    return ~(np.abs(stored.astype(np.float64) - recorded) <= tolerance)


def misplaced(head: Array, position: Array, heads: int, expected: Array) -> str | None:
    """Return what is wrong with the places of rows, or None if every head has every expected position exactly once.

    Parameters
    ----------
    head, position : array
        Place of each row.
    heads : int
        Number of heads.
    expected : array
        The expected positions, ascending.
    """
    if len(head) and not (head.min() >= 0 and head.max() < heads):
        return f"it has rows of a head that is not one of {heads}"
    index = np.searchsorted(expected, position)
    if len(position) and not (
        len(expected) and np.array_equal(expected[np.minimum(index, len(expected) - 1)], position)
    ):
        return "it has rows of positions that were not recorded"
    times = np.bincount(head.astype(np.int64) * len(expected) + index, minlength=heads * len(expected))
    if (times != 1).any():
        place = int((times != 1).argmax())
        where = f"head {place // len(expected)}, position {expected[place % len(expected)]}"
        return f"it has {'no row' if times[place] == 0 else f'{times[place]} rows'} for {where}"
    return None

"""Digest of the decisions of a run: equal exactly if all residency intervals are equal."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvscope.core.errors import ResultError

Array = NDArray[Any]


class Digests:
    """SHA-256 of the residency of each run, taken while it is written.

    Every layer of a sequence gives the hash of its residency intervals ``(kv_head, key, enter, leave)``, sorted, as
    32-bit little-endian numbers, -1 for a ``leave`` that never comes. The digest of a run is the hash over
    ``(sequence, layer)`` and these hashes, by number. So neither the order of writing nor the form of the file matters.
    """

    def __init__(self) -> None:
        self._layers: dict[int, dict[tuple[int, int], bytes]] = defaultdict(dict)

    def add(
        self, run: int, sequence: int, layer: int, *, kv_head: Array, key: Array, enter: Array, leave: Array
    ) -> None:
        """Take all residency intervals of one layer; ``leave`` below 0 is never.

        Raises
        ------
        ResultError
            If this layer has been taken already.
        """
        of_run = self._layers[run]
        if (sequence, layer) in of_run:
            raise ResultError(
                f"residency of run {run}, sequence {sequence}, layer {layer} is written twice",
                "Write all residency intervals of a layer at once.",
            )
        rows = np.stack([kv_head, key, enter, np.maximum(leave, -1)]).astype("<i4")  # [4, N]
        order = np.lexsort(rows[2::-1])  # no key enters twice at one step, so `leave` is not needed to sort
        ordered = np.ascontiguousarray(rows[:, order].T)  # [N, 4]
        of_run[sequence, layer] = hashlib.sha256(ordered.tobytes()).digest()

    def of(self, run: int) -> str:
        """Return the digest of a run, in hexadecimal."""
        whole = hashlib.sha256()
        for place, digest in sorted(self._layers[run].items()):
            whole.update(np.array(place, "<i4").tobytes() + digest)
        return whole.hexdigest()

"""How many keys a step reads and holds."""

from __future__ import annotations

import torch
from torch import Tensor

from kvscope.metrics.base import Rows, metric


@metric("read_keys", direction="none", range=(1.0, None), when_nothing_evicted=None, unit="keys")
def read_keys(rows: Rows) -> Tensor:
    """Number of keys that the query can attend to, ``|V_t|``, its own key included."""
    return rows.kept.keys


@metric("held_keys", direction="none", range=(0.0, None), when_nothing_evicted=None, unit="keys")
def held_keys(rows: Rows) -> Tensor:
    """Number of keys in the cache after the eviction of the step, ``|R_t|``.

    Every query head has the number of its key/value head.
    """
    heads = rows.full.shape[-3]
    return (
        rows.held.sum(-1, dtype=torch.int32).to(rows.full.dtype).repeat_interleave(heads // rows.held.shape[2], dim=2)
    )

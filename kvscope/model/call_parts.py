"""Parts of attention calls: some heads, own keys and values, whole rows, and whether the mask is causal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvscope.core.errors import ModelError
from kvscope.model.attention_hook import Call
from kvscope.trace.blocks import Array

HIDDEN_KEY = -1e4  # an additive mask is below this for a hidden key, in every dtype


class Heads:
    """Restricts calls to some query heads, in whole groups, and to their keys and values."""

    def __init__(self, heads: Sequence[int]) -> None:
        self._heads = list(heads)
        self._indices: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}  # sent to a device once

    def of(self, call: Call) -> Call:
        """Return the call with these heads only."""
        heads, kv_heads = self._on(call.query.shape[1] // call.key.shape[1], call.query.device)
        mask = call.mask if call.mask is None or call.mask.shape[1] == 1 else call.mask.index_select(1, heads)
        sinks = None if call.sinks is None else call.sinks.index_select(0, heads)
        key, value = call.key.index_select(1, kv_heads), call.value.index_select(1, kv_heads)
        return replace(call, query=call.query.index_select(1, heads), key=key, value=value, mask=mask, sinks=sinks)

    def keys(self, key: Tensor, group: int) -> Tensor:
        """Return the keys ``[batch, ., k, D]`` that these heads read of those of all, which `group` heads share."""
        return key.index_select(1, self._on(group, key.device)[1])

    def _on(self, group: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the query heads and the key/value heads, where `group` query heads share one."""
        if (group, device) not in self._indices:
            groups = sorted({head // group for head in self._heads})
            self._indices[group, device] = (
                torch.tensor(self._heads, device=device),
                torch.tensor(groups, device=device),
            )
        return self._indices[group, device]


def own_vectors(call: Call, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values at the positions of queries `start` to `stop` - 1 of a call, ``[G, n, D]``."""
    count = call.query.shape[2]
    return call.key[0, :, -count:][:, start:stop], call.value[0, :, -count:][:, start:stop]


def is_causal(call: Call, mask: Tensor, start: int, stop: int) -> Tensor:
    """Return on the device whether queries `start` to `stop` - 1 see exactly the keys up to their own in the window."""
    count, keys = call.query.shape[2], call.key.shape[2]
    mask = mask[:, :, start:stop, :keys]
    position = torch.arange(start, stop, device=mask.device)[:, None] + keys - count
    key = torch.arange(keys, device=mask.device)
    seen = key <= position
    if call.sliding_window is not None:
        seen &= key > position - call.sliding_window
    return (mask == seen if mask.dtype == torch.bool else torch.where(seen, mask == 0, mask < HIDDEN_KEY)).all()


def refuse_other_masks(layer: int, correct: Array) -> None:
    """Raise ModelError if the answer of `is_causal` is no."""
    if not correct:
        raise ModelError(
            f"layer {layer} has a mask that is not causal within a window, so vectors do not determine its rows",
            "Record the rows: --store maps.",
        )


def placed(rows: Tensor, call: Call, first: int) -> Tensor:
    """Return rows padded with zeros for the oldest keys, which a sliding-window cache no longer holds."""
    offset = first + call.query.shape[2] - call.key.shape[2]
    return torch.nn.functional.pad(rows, (offset, 0)) if offset else rows

"""Attention of the closed loop with a quantised cache: the same pass over a text, with keys and values as codes.

Which keys are codes at a step, and of which tokens, follows from the scheme and from what is held: see
`kvscope.quantisation.layer`. A row of a step is made of logits with both versions of each key; policies see these rows.
What a policy reads beside rows (norms, keys, values) it reads of each token as it comes, in full precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from kvscope.closed_loop.pass_shape import PassShape
from kvscope.core.cache_scheme import CacheScheme
from kvscope.model.attention_hook import Call
from kvscope.model.derotation import Derotation
from kvscope.quantisation.layer import QuantisedLayer, Rotation


class QuantisedCall:
    """One layer's attention with a quantised cache, for the runs of a batch.

    Parameters
    ----------
    call : Call
        The attention call of the layer; its batch axis is the runs.
    scheme : CacheScheme
        How the caches are quantised.
    text : PassShape
        Sizes.
    unrotated : mapping of int to Derotation
        Of each layer, where keys are quantised without their position.
    """

    def __init__(self, call: Call, scheme: CacheScheme, text: PassShape, unrotated: Mapping[int, Derotation]) -> None:
        turn = unrotated.get(call.layer)
        self.layer = QuantisedLayer(
            scheme,
            call.key,
            call.value,
            text.prompt if text.prefill == "full" else 0,
            call.exact,
            Rotation(turn.off, turn.on) if scheme.before_rotation and turn is not None else None,
            call.sliding_window or 0,
            call.chunk or 0,
        )
        self.call = call

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows over all earlier keys, each in the precision it has in the cache, ``[R, H, b, stop]``."""
        coded, _ = self.layer.coded(start, stop)
        logits = self.call.logits(start, stop, stop)
        if bool(coded.any()):
            other = replace(self.call, key=self.layer.coded_key).logits(start, stop, stop)
            logits = torch.where(coded, other, logits)
        return self.call.softmax(logits)

    def whole_rows(self, start: int, stop: int) -> Tensor:
        """Return the same rows with all keys in full precision."""
        return self.call.rows(start, stop, stop)

    @property
    def sinks(self) -> bool:
        """Whether the layer has learned sinks."""
        return self.call.sinks is not None

"""The pass of a model over a prompt, shared by runs that decode after it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from kvscope.model.attention_hook import Call


@dataclass
class PromptPass:
    """The pass of a model over a prompt, which is the same for every run with full prefill: the first decoder fills it.

    It stays empty where the model keeps more of a prompt than keys and values, or where the prompt has images.

    Attributes
    ----------
    logits : Tensor or None
        ``[1, P, V]``.
    calls : list of Call
        The attention call of every layer that owns a cache.
    came : dict of int to (Tensor, Tensor)
        Keys and values that the cache of each of these layers received, ``[1, G, P, D]``.
    """

    logits: Tensor | None = None
    calls: list[Call] = field(default_factory=list)
    came: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

"""What is done with the keys that a decoder holds beside removing some: they are quantised, or merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from kvscope.closed_loop.coded_cache import CodedCache, Quantised
from kvscope.closed_loop.like_layers import LikeLayers
from kvscope.closed_loop.merged_cache import MergedCache
from kvscope.core.merge_scheme import MergeScheme
from kvscope.engine.runs import RunSpec
from kvscope.model.derotation import Derotation
from kvscope.model.short_cache import ShortLayer


class CacheWriter(Protocol):
    """Changes what some layers hold, step by step."""

    def before(self, t: int, parts: Sequence[LikeLayers]) -> None:
        """Change keys at the end of step `t`, before those that are evicted leave."""

    def after(self, tokens: int, parts: Sequence[LikeLayers]) -> None:
        """Change keys once so many tokens have come and the evicted ones have left."""


@dataclass(frozen=True)
class CacheChanges:
    """How the cache of a run differs from one that only loses keys.

    Attributes
    ----------
    quantised : Quantised or None
        How it is quantised.
    merge : MergeScheme or None
        How what is evicted is merged into what stays.
    """

    quantised: Quantised | None = None
    merge: MergeScheme | None = None

    @classmethod
    def of(cls, run: RunSpec, unrotated: Mapping[int, Derotation]) -> CacheChanges:
        """Return the changes that a run asks for."""
        return cls(Quantised.of(run.cache, unrotated), run.merge)

    def writers(self, layers: Mapping[int, ShortLayer], prompt: int, exact: torch.dtype) -> list[CacheWriter]:
        """Return what changes the caches of `layers`.

        `prompt` are the tokens that go through one pass before the others are decoded, `exact` is the dtype to compute
        in.
        """
        found: list[CacheWriter] = []
        if self.quantised is not None:
            found.append(CodedCache(self.quantised, layers, prompt, exact))
        if self.merge is not None:
            found.append(MergedCache(self.merge, layers, exact))
        return found

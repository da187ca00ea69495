"""A text that the closed loop reads, and which of its tokens are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvscope.core.options import Prefill
from kvscope.trace.reader import TokenSequence

Array = NDArray[Any]


@dataclass(frozen=True)
class Passage:
    """Token ids ``[T]``, how they are divided, and their log-probabilities ``[T]`` where these are known."""

    sequence: TokenSequence
    ids: Tensor
    logprob: Array | None = None


def scored_tokens(sequence: TokenSequence, prefill: Prefill) -> Array:
    """Return the positions of the tokens that are scored: each is predicted by the one before it."""
    return np.arange(sequence.prompt if prefill == "full" else 1, sequence.length)

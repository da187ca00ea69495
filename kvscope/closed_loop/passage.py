"""A text for the closed loop, and which of its tokens are scored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvscope.core.options import Prefill
from kvscope.trace.reader import TokenSequence


@dataclass(frozen=True)
class Passage:
    """Token ids ``[T]``, their division into prompt and rest, and their log-probabilities ``[T]`` if recorded."""

    sequence: TokenSequence
    ids: Tensor
    logprob: NDArray[np.floating] | None = None


def scored_tokens(sequence: TokenSequence, prefill: Prefill) -> NDArray[np.int64]:
    """Return the positions of the tokens that are scored: each is predicted by the one before it."""
    return np.arange(sequence.prompt if prefill == "full" else 1, sequence.length)

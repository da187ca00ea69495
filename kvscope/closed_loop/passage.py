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
    """Token ids ``[T]``, their division into prompt and rest, and their log-probabilities ``[T]`` if recorded.

    The first `prefix` tokens are those that the tokenizer puts before every text. They are not text, so that none of
    them is scored.
    """

    sequence: TokenSequence
    ids: Tensor
    logprob: NDArray[np.floating] | None = None
    prefix: int = 0


def scored_tokens(passage: Passage, prefill: Prefill) -> NDArray[np.int64]:
    """Return the positions of the tokens of the text that are scored: each is predicted by the one before it."""
    first = passage.sequence.prompt if prefill == "full" else 1
    return np.arange(max(first, passage.prefix), passage.sequence.length)

"""Classes of the tokens of a text, and of every token of a vocabulary, as a tokenizer has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvscope.core.model_types import Tokenizer
from kvscope.core.token_classes import token_classes
from kvscope.model.prompts import decoder_of, token_texts
from kvscope.model.token_ids import tokenizer_explained


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the numbers of the tokens that a tokenizer calls special, ascending."""
    return sorted({int(number) for number in tokenizer.all_special_ids if number is not None})


def kinds_of_text(tokenizer: Tokenizer, ids: Sequence[int]) -> Tensor:
    """Return the signal ``token_kinds`` of a text, float32 ``[T]``, from the text that each token adds, as in a trace.

    Raises ModelError if the tokenizer fails.
    """
    classes = token_classes(ids, token_texts(tokenizer, ids), special_ids(tokenizer))
    return torch.tensor(classes, dtype=torch.float32)


def kinds_of_ids(tokenizer: Tokenizer, count: int) -> Tensor:
    """Return the class of each token of a vocabulary by its number, float32 ``[count]``, from its text alone.

    Raises ModelError if the tokenizer fails.
    """
    ids = range(count)
    with tokenizer_explained(tokenizer):
        decode = decoder_of(tokenizer)
        texts = [decode([number]) if number < len(tokenizer) else "" for number in ids]
    return torch.tensor(token_classes(ids, texts, special_ids(tokenizer)), dtype=torch.float32)

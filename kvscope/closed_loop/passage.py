"""A text for the closed loop, and which of its tokens are scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.core.model_types import CausalModel
from kvscope.core.options import Prefill
from kvscope.model.image_prompts import ImageInputs
from kvscope.trace.reader import TokenSequence


@dataclass(frozen=True)
class Passage:
    """Token ids ``[T]``, their division into prompt and rest, and their log-probabilities ``[T]`` if recorded.

    The first `prefix` tokens are those that the tokenizer puts before every text. They are not text, so that none of
    them is scored. `images` is what the model reads of the images of the prompt; `readings` are
    the largest weights on the keys of each layer in a second reading of it, ``[G, T]``, if recorded. `kinds` are the
    classes of the tokens, float32 ``[T]``, where the tokenizer is known; see `kvscope.core.token_classes`.
    """

    sequence: TokenSequence
    ids: Tensor
    logprob: NDArray[np.floating] | None = None
    prefix: int = 0
    images: ImageInputs | None = None
    readings: Mapping[int, Tensor] = field(default_factory=dict)
    kinds: Tensor | None = None

    @property
    def text_ids(self) -> Tensor:
        """The ids without those of images, which mean nothing without them; all if nothing is left."""
        texts = self.ids if self.images is None else self.ids[self.ids != self.images.token]
        return texts if len(texts) else self.ids

    def beside(self, count: int) -> dict[str, Tensor]:
        """Return the model's inputs beside the first `count` ids, which contain the prompt."""
        return {} if self.images is None else self.images.for_tokens(count)


def probe_of(model: CausalModel, passages: Sequence[Passage]) -> Tensor:
    """Return the text of the first passage, with which a model is checked, int64 ``[1, n]`` on its device."""
    return passages[0].text_ids[None].to(model.get_input_embeddings().weight.device)


def scored_tokens(passage: Passage, prefill: Prefill) -> NDArray[np.int64]:
    """Return the positions of the tokens of the text that are scored: each is predicted by the one before it."""
    first = passage.sequence.prompt if prefill == "full" else 1
    return np.arange(max(first, passage.prefix), passage.sequence.length)


def require_decodable_images(passages: Sequence[Passage], prefill: Prefill) -> None:
    """Raise UsageError if a prompt with images is to be decoded token by token."""
    if prefill is Prefill.stream and any(passage.images for passage in passages):
        raise UsageError(
            "a prompt with images cannot be decoded token by token: a model reads an image in one pass",
            "Use --prefill full, or a trace of prompts without images.",
        )

"""The one rule by which a text becomes token ids; every part of kvscope that encodes text uses it.

- The tokens that a tokenizer puts before every text (BOS, or a prefix such as ``[gMASK]<sop>``) are put before a prompt
  and before each window of a longer text, once: not where the text itself begins with them.
- The tokens that a tokenizer puts after every text (EOS) are omitted: the model is to continue the text.
- A continuation is encoded together with its prompt, as one text, so that no space is put between them.
- Special tokens that are written in a text are read as such, as transformers does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from kvscope.core.errors import KvscopeError, ModelError, UsageError
from kvscope.core.model_types import Tokenizer
from kvscope.model.explain import first_line

_PROBES = ("a", "1.")  # two texts without a common beginning or end


@dataclass(frozen=True)
class Affixes:
    """The ids that a tokenizer puts before and after every text."""

    before: list[int]
    after: list[int]


class TextEncoder:
    """Encodes texts with a tokenizer by the rule of this module.

    Raises
    ------
    ModelError
        If the tokenizer fails.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.prefix = self._affixes(special=True).before
        self._always = self._affixes(special=False)  # of tokenizers that ignore `add_special_tokens`

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text alone, without prefix and EOS."""
        ids, always = self._ids(text, special=False), self._always
        stop = len(ids) - len(always.after)
        if always.after and ids[stop:] == always.after:
            ids = ids[:stop]
        return ids[len(always.before) :] if _begins(ids, always.before) else ids

    def without_prefix(self, ids: list[int]) -> list[int]:
        """Return the ids of a text without the prefix with which it begins itself, if it does."""
        return ids[len(self.prefix) :] if self.writes_prefix(ids) else ids

    def writes_prefix(self, ids: Sequence[int]) -> bool:
        """Return whether a text begins with the prefix itself; False if the tokenizer has none."""
        return bool(self.prefix) and _begins(ids, self.prefix)

    def split(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the ids of a prompt and of the text that continues it, encoded together and without prefix.

        A token that contains both the end of the prompt and the beginning of the continuation is the continuation's.
        """
        own, whole = self.encode(prompt), self.encode(prompt + continuation)
        same = next((place for place, (a, b) in enumerate(zip(own, whole, strict=False)) if a != b), len(own))
        same = min(same, len(whole))
        return whole[:same], whole[same:]

    def _affixes(self, *, special: bool) -> Affixes:
        nothing = self._ids("", special=special)
        probes = [self._ids(text, special=special) for text in _PROBES]
        before = 0
        while before < len(nothing) and all(ids[: before + 1] == nothing[: before + 1] for ids in probes):
            before += 1
        after = nothing[before:]
        if not all(ids[len(ids) - len(after) :] == after for ids in probes):
            after = []
        return Affixes(nothing[:before], after)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        with tokenizer_explained(self._tokenizer):
            # Not verbose: no warning about the length, which is checked against the model's context.
            return list(self._tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


@contextmanager
def tokenizer_explained(tokenizer: Tokenizer) -> Iterator[None]:
    """Turn an error of a tokenizer, whatever its type, into a `ModelError`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, KvscopeError, MemoryError):
        raise
    except BaseException as error:  # tokenizers raises bare exceptions, and panics that are no exceptions
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} failed: {first_line(error)}",
            "Check that it fits the text, or download it again with its model.",
        ) from error


def windows(encoder: TextEncoder, ids: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield the windows of a text's ids: each begins with the prefix, and has at most `size` ids with it.

    Raises
    ------
    UsageError
        If the prefix fills a window.
    """
    step = size - len(encoder.prefix)
    if step < 1:
        raise UsageError(
            f"a window of {size} tokens has no room beside the {len(encoder.prefix)} that begin every text",
            "Raise --window.",
        )
    for start in range(0, len(ids), step):
        yield [*encoder.prefix, *ids[start : start + step]]


def _begins(ids: Sequence[int], with_: Sequence[int]) -> bool:
    return list(ids[: len(with_)]) == list(with_)

"""How many tokens a text has at least, known from its length: a text that is far too long need not be encoded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kvscope.core.model_types import Tokenizer

_KEEPS_ALL = {"ByteLevel", "Digits"}  # pre-tokenizers that remove nothing from a text
_BYTES = 256


def fewest_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Return a number of tokens that a text has at least, without encoding it.

    It is the number of bytes divided by those of the longest token, where every byte of a text is in some token: with
    byte-level BPE that neither normalises nor removes anything. 0 for any other tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return 0
    longest = _longest(json.loads(backend.to_str()))
    return -(-len(text.encode("utf-8", "surrogatepass")) // longest) if longest else 0


def _longest(about: Mapping[str, Any]) -> int:
    """Return the bytes of a tokenizer's longest token; 0 if a token may stand for more than its own bytes."""
    model, added = about["model"], about["added_tokens"]
    before = about["pre_tokenizer"] or {}
    steps = before.get("pretokenizers", [before])
    kinds = {step.get("type") for step in steps}
    removes = any(step.get("behavior") == "Removed" for step in steps)
    if model["type"] != "BPE" or about["normalizer"] or removes or "ByteLevel" not in kinds:
        return 0
    if kinds - _KEEPS_ALL - {"Split"} or any(token["lstrip"] or token["rstrip"] for token in added):
        return 0
    vocabulary = model["vocab"]
    if sum(len(token) == 1 for token in vocabulary) < _BYTES:  # BPE omits bytes that have no token
        return 0
    # In the vocabulary each byte is one character; added tokens are written as they are.
    return max(*map(len, vocabulary), *(len(token["content"].encode()) for token in added), 1)

"""Count the tokens of texts with a model's tokenizer, without its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import AutoTokenizer

from kvscope.core.options import ModelSource
from kvscope.model.explain import explained
from kvscope.model.gguf_file import place_of
from kvscope.model.loading import hub_answers, require_vocabulary
from kvscope.model.names import resolve
from kvscope.model.token_ids import TextEncoder


def token_counter(source: ModelSource) -> Callable[[str], int]:
    """Return a function that counts the tokens of a prompt, with those that the tokenizer puts before every text.

    Raises
    ------
    ModelError
        If the tokenizer is not found or fails.
    """
    assert isinstance(source.model, str), "a loaded model has its own tokenizer"
    name = resolve(source.model)
    local = Path(name).exists()
    place, named = place_of(name)
    offline = not local and not hub_answers(name, source.revision)
    with explained(name, "tokenizer", offline=offline):
        tokenizer = AutoTokenizer.from_pretrained(
            place,
            **named,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            local_files_only=local or offline,
        )
        require_vocabulary(name, tokenizer)
    tokenizer.model_max_length = 10**12  # prompts may be too long while their size is searched: no warning
    encoder = TextEncoder(tokenizer)
    return lambda text: len(encoder.prefix) + len(encoder.encode(text))

"""Encode prompts, and split the text into the parts that each token adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tokenizers import decoders

from kvscope.core.errors import UsageError
from kvscope.core.model_types import Tokenizer
from kvscope.core.recording_options import TextOptions
from kvscope.core.text_files import require_whole
from kvscope.core.text_spans import TokenSpan, token_range
from kvscope.model.chat import render, render_with_images
from kvscope.model.fewest_tokens import fewest_tokens
from kvscope.model.image_prompts import ImageInputs, encode_with_images, read_images
from kvscope.model.loading import Loaded
from kvscope.model.processors import processor_of
from kvscope.model.prompt_files import PromptText
from kvscope.model.token_ids import TextEncoder, tokenizer_explained

_FAR_TOO_LONG = 8  # characters for each token of the context: a shorter text is encoded at once


@dataclass(frozen=True)
class Prompt:
    """One prompt: where it was read, its text as the model reads it, and its token ids.

    Attributes
    ----------
    source : PromptText
        As it was read.
    text : str
        Its text; of a conversation, as the chat template rendered it.
    ids : list of int
        Token ids.
    forced : list of int, or None
        Token ids of a forced continuation.
    rendered : bool
        Whether a chat template rendered the text.
    notes : tuple of str
        What the user should know about the ids.
    spans : tuple of TokenSpan
        Named parts of the prompt.
    inputs : ImageInputs or None
        What the model reads of its images; None if it has none.
    generated : bool
        Whether the forced continuation is what the model itself generated before.
    """

    source: PromptText
    text: str
    ids: list[int]
    forced: list[int] | None = None
    rendered: bool = False
    notes: tuple[str, ...] = ()
    spans: tuple[TokenSpan, ...] = ()
    inputs: ImageInputs | None = None
    generated: bool = False

    @property
    def text_ids(self) -> list[int]:
        """The ids without those of images, which mean nothing without them; all if nothing is left."""
        token = None if self.inputs is None else self.inputs.token
        return [each for each in self.ids if each != token] or self.ids


def encode(loaded: Loaded, prompt: PromptText, options: TextOptions) -> Prompt:
    """Return the token ids of a prompt and of its forced continuation, by the rule of `kvscope.model.token_ids`.

    Raises
    ------
    UsageError
        If the prompt or its continuation has no tokens, or they exceed the context; if options of chat templates are
        given for a text; if the model has no chat template.
    ModelError
        If the tokenizer or the chat template fails.
    """
    chat = options.chat or prompt.messages is not None
    if not chat and (options.system is not None or options.chat_options):
        option = "--chat-option" if options.system is None else "--system"
        raise UsageError(f"{option} is for chat templates, and {prompt.place} is a text", "Add --chat.")
    text = _rendered(loaded, prompt, options) if chat else prompt.text
    require_whole(f"prompt {prompt.place}", text)  # options of the template may contain what no file does
    _require_possible(loaded, prompt, text)
    encoder = TextEncoder(loaded.tokenizer)
    notes: list[str] = []
    forced: list[int] | None = None
    inputs: ImageInputs | None = None
    if prompt.images:
        processor_of(loaded, prompt.place)
        files = read_images(prompt, options.images.read_address)
        ids, forced, inputs = encode_with_images(loaded, prompt, text, files, encoder, chat=chat)
    elif prompt.continuation is None:
        ids = encoder.encode(text)
    else:
        ids, forced = _with_continuation(encoder, prompt, text, notes)
    if encoder.writes_prefix(ids):
        if not chat:
            notes.append(f"prompt {prompt.place} begins with {_shown(loaded, encoder.prefix)}: none is added")
    elif not chat and inputs is None:  # a chat template writes what the model expects
        ids = [*encoder.prefix, *ids]
    if not ids:
        raise UsageError(f"prompt {prompt.place} has no tokens", "Write other text into it.")
    if forced is None and ids[-1] == getattr(loaded.tokenizer, "eos_token_id", None):
        notes.append(f"prompt {prompt.place} ends with {_shown(loaded, ids[-1:])}: the model generates after it")
    _require_context(loaded, prompt, ids, options.max_new_tokens if forced is None else len(forced))
    spans = _token_spans(loaded.tokenizer, prompt, ids, notes)
    spans += () if inputs is None else inputs.spans
    return Prompt(prompt, text, ids, forced, chat, tuple(notes), spans, inputs)


def _rendered(loaded: Loaded, prompt: PromptText, options: TextOptions) -> str:
    """Return the text of a conversation, with placeholders for its images if it has any."""
    if not prompt.images:
        return render(loaded, prompt, options.system, options.chat_options)
    processor = processor_of(loaded, prompt.place)
    return render_with_images(loaded, processor, prompt, options.system, options.chat_options)


def _token_spans(
    tokenizer: Tokenizer, prompt: PromptText, ids: Sequence[int], notes: list[str]
) -> tuple[TokenSpan, ...]:
    """Return the tokens of a prompt's spans; none, with a note, if its text is not found among its tokens."""
    if not prompt.spans:
        return ()
    texts = token_texts(tokenizer, ids)
    begins = "".join(texts).find(prompt.text)  # after BOS, or inside of a chat template
    if begins < 0:
        notes.append(f"prompt {prompt.place}: its spans are omitted: its tokens do not show its text as it is")
        return ()
    return tuple(
        TokenSpan(span.name, *token_range(begins + span.start, begins + span.stop, texts)) for span in prompt.spans
    )


def _with_continuation(
    encoder: TextEncoder, prompt: PromptText, text: str, notes: list[str]
) -> tuple[list[int], list[int]]:
    """Return the ids of a prompt's text and of its continuation; add a note if a token belongs to both."""
    assert prompt.continuation is not None, "the caller checks it"
    ids, forced = encoder.split(text, prompt.continuation)
    if not forced:
        raise UsageError(f"the continuation of prompt {prompt.place} has no tokens", "Write some text into it.")
    moved = len(encoder.encode(text)) - len(ids)
    if moved and not ids:
        raise UsageError(
            f"prompt {prompt.place} and its continuation merge into the same tokens",
            "Put a space or a new line between them.",
        )
    if moved:
        notes.append(
            f"prompt {prompt.place}: its last {moved} of {moved + len(ids)} tokens merge with the continuation, "
            "and are forced with it"
        )
    return ids, forced


def _require_context(loaded: Loaded, prompt: PromptText, ids: Sequence[int], new: int) -> None:
    """Raise UsageError if a prompt and its new tokens exceed the model's context."""
    if loaded.context is not None and len(ids) + new > loaded.context:
        raise UsageError(
            f"prompt {prompt.place} has {len(ids)} tokens, which with {new} new ones exceeds the context of "
            f"{loaded.context}",
            "Shorten the prompt, or lower --max-new-tokens.",
        )


def _require_possible(loaded: Loaded, prompt: PromptText, text: str) -> None:
    """Raise UsageError if a prompt exceeds the model's context by its length alone: 10 MB take 20 s to encode."""
    if loaded.context is None or len(text) < _FAR_TOO_LONG * loaded.context:
        return
    fewest = fewest_tokens(loaded.tokenizer, text)
    if fewest > loaded.context:
        raise UsageError(
            f"prompt {prompt.place} has {len(text)} characters, so at least {fewest} tokens, which exceeds the context "
            f"of {loaded.context}",
            "Shorten the prompt.",
        )


def _shown(loaded: Loaded, ids: Sequence[int]) -> str:
    with tokenizer_explained(loaded.tokenizer):
        return "".join(loaded.tokenizer.convert_ids_to_tokens(list(ids)))


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds; joined, these parts are the whole text.

    A token that ends inside a multi-byte character adds nothing; the token that completes the character adds it.

    Raises
    ------
    ModelError
        If the tokenizer fails.
    """
    texts, before, shown, start = [], 0, "", 0  # `start`: first token whose text is not in `texts` yet
    with tokenizer_explained(tokenizer):
        decode = decoder_of(tokenizer)
        for stop in range(1, len(ids) + 1):
            whole = decode(ids[before:stop])
            if whole.endswith("\ufffd") and stop < len(ids) and stop - start < 8:
                texts.append("")
                continue
            texts.append(whole[len(shown) :])
            # Decode the next tokens after these: some tokenizers drop the space before the first word. After all of
            # these: some decode bytes that follow each other only if they are whole characters together.
            before, shown, start = start, decode(ids[start:stop]), stop
    return texts


def decoder_of(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """Return the function that decodes ids to text.

    Some tokenizers have no decoder of their own: their space marks, ``▁`` or ``Ġ``, would be shown as they are.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.decoder is None:
        made_by = f"{backend.pre_tokenizer} {backend.normalizer}"
        if "ByteLevel" in made_by:
            return lambda ids: str(decoders.ByteLevel().decode(tokenizer.convert_ids_to_tokens(list(ids))))
        if "Metaspace" in made_by or "▁" in made_by:
            return lambda ids: "".join(tokenizer.convert_ids_to_tokens(list(ids))).replace("▁", " ")
    return lambda ids: str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

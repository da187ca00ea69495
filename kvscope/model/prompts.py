"""Read prompts from files, encode them, and split the text into the parts that each token adds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvscope.core.errors import UsageError
from kvscope.core.model_types import Tokenizer
from kvscope.model.loading import Loaded


@dataclass(frozen=True)
class Prompt:
    """One prompt: its file, its text, its token ids, and the ids of a forced continuation."""

    file: str
    text: str
    ids: list[int]
    forced: list[int] | None = None


def read_prompts(prompts: Sequence[Path | str], continuation: Path | None) -> list[tuple[str, str, str | None]]:
    """Return file, prompt and continuation (or None) of every sequence.

    Raises
    ------
    UsageError
        If a file cannot be read or is empty, or a line of a JSONL file is not a prompt.
    """
    forced = None if continuation is None else read_text(Path(continuation))
    texts: list[tuple[str, str, str | None]] = []
    for file in map(Path, prompts):
        content = read_text(file)
        if file.suffix != ".jsonl":
            texts.append((str(file), content, forced))
            continue
        lines = [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]
        if not lines:
            raise UsageError(f"{file} is empty", 'Write one prompt per line: {"prompt": "..."}')
        texts.extend((str(file), *_jsonl(file, number, line, forced)) for number, line in lines)
    if not texts:
        raise UsageError("no prompt is named", "Name a text file: kvscope trace --model demo FILE")
    for name, text, following in texts:
        if not text.strip():
            raise UsageError(f"prompt {name} is empty", "Write some text into it.")
        if following == "":
            raise UsageError(
                f"the continuation of prompt {name} is empty", "Write some text into it, or omit it to generate."
            )
    return texts


def _jsonl(file: Path, number: int, line: str, forced: str | None) -> tuple[str, str | None]:
    try:
        entry = json.loads(line)
        text, following = entry["prompt"], entry.get("continuation", forced)
        if not isinstance(text, str) or not isinstance(following, str | None):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(
            f"{file}, line {number}: no prompt", 'Write an object with a text into each line: {"prompt": "..."}'
        ) from None
    return text, following


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file; raises UsageError if it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {file}: {error.strerror}", "Name a text file that exists.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text", "Name a text file.") from error


def encode(loaded: Loaded, file: str, text: str, forced: str | None, *, chat: bool, max_new_tokens: int) -> Prompt:
    """Return the token ids of a prompt and of its forced continuation.

    Raises
    ------
    UsageError
        If the prompt has no tokens or exceeds the context, or `chat` is set and the model has no chat template.
    """
    tokenizer = loaded.tokenizer
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(f"model {loaded.name} has no chat template", "Omit --chat, or trace a chat model.")
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = tokenizer(text, verbose=False)["input_ids"]  # no warning about the length: it is checked below
    if not ids:
        raise UsageError(f"prompt {file} is empty", "Write some text into it.")
    after = None if forced is None else tokenizer(forced, add_special_tokens=False, verbose=False)["input_ids"]
    new = max_new_tokens if after is None else len(after)
    if loaded.context is not None and len(ids) + new > loaded.context:
        raise UsageError(
            f"prompt {file} has {len(ids)} tokens, which with {new} new ones exceeds the context of {loaded.context}",
            "Shorten the prompt, or lower --max-new-tokens.",
        )
    return Prompt(file, text, list(ids), None if after is None else list(after))


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds; joined, these parts are the whole text.

    A token that ends inside a multi-byte character adds nothing; the token that completes the character adds it.
    """
    texts, start, shown = [], 0, ""
    for stop in range(1, len(ids) + 1):
        whole = tokenizer.decode(ids[start:stop], clean_up_tokenization_spaces=False)
        if whole.endswith("\ufffd") and stop < len(ids) and stop - start < 8:
            texts.append("")
            continue
        texts.append(whole[len(shown) :])
        # Decode the next tokens after this one: some tokenizers drop the space before the first word.
        start, shown = stop - 1, tokenizer.decode(ids[stop - 1 : stop], clean_up_tokenization_spaces=False)
    return texts

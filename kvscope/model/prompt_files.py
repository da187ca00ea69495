"""Read prompts from files: texts, and JSON or JSON lines in the forms in which benchmarks publish them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kvscope.core.errors import UsageError
from kvscope.core.json import Json, JsonDict
from kvscope.core.text_files import BOM, file_name, read_exactly, read_text, require_one_input, require_whole
from kvscope.core.text_names import STANDARD_INPUT, text_ending
from kvscope.core.text_spans import TextSpan
from kvscope.model.benchmarks import with_benchmark
from kvscope.model.example_facts import ExampleFacts, example_facts, text_spans
from kvscope.model.image_parts import Message, images_beside, images_within
from kvscope.model.prompt_entries import EXAMPLE, PARQUET, entries_of, is_objects, rows_of, visible_files
from kvscope.model.prompt_template import PromptTemplate

LINES, WHOLE = (".jsonl", ".ndjson"), ".json"
ANSWERS = ("answers", "outputs", "answer")
QUESTIONS = ("input", "question")
TABLES = (".csv", ".tsv", ".xlsx", ".arrow", ".feather", ".yaml", ".yml", ".toml")  # data, but not prose


@dataclass(frozen=True)
class PromptText:
    """One prompt as it was read.

    Attributes
    ----------
    file, place : str
        Its file; file and line for messages.
    text : str
        Empty for a conversation.
    messages : tuple of dict, or None
        The conversation.
    continuation : str or None
        Text to force after it.
    answers : tuple of str, or None
        Right answers.
    field : str or None
        Fields of the line that it was read from, or the template that it was made with.
    example : ExampleFacts or None
        What a dataset says about it.
    spans : tuple of TextSpan
        Named parts of `text`.
    images : tuple of str
        Paths and addresses of its images, in the order of their places in the text or the messages.
    """

    file: str
    place: str
    text: str
    messages: tuple[Message, ...] | None = None
    continuation: str | None = None
    answers: tuple[str, ...] | None = None
    field: str | None = None
    example: ExampleFacts | None = None
    spans: tuple[TextSpan, ...] = ()
    images: tuple[str, ...] = ()


def read_prompts(
    prompts: Sequence[Path | str],
    continuation: Path | None,
    field: str | None = None,
    template: str | None = None,
) -> list[PromptText]:
    """Return every prompt of files, with the continuation of all where a prompt has none of its own.

    Files that end in ``.jsonl`` or ``.ndjson`` have an object per line, ``.json`` files an object or a list of them,
    ``.parquet`` files one in each row; of a folder every file is read, in the order of their names. Standard input and
    files without an ending have JSON or a text; tables (`TABLES`) are refused; all others are one text.

    Parameters
    ----------
    field : str, optional
        Field of the text or of the messages; otherwise the first that an object has of ``prompt``, ``messages``,
        ``context`` with ``input`` or ``question``, ``input``, ``text`` and ``question``.
    template : str, optional
        Text of every prompt, in which ``{name}`` is the field of that name; instead of `field`.

    Raises
    ------
    UsageError
        If a file cannot be read or is empty, or an object has no prompt, not a field of the template, or one twice.
    """
    require_one_input([*prompts, *([] if continuation is None else [continuation])])
    if field is not None and template is not None:
        raise UsageError("--field and --template are both given", "Name the field in the template: {field}")
    forced, filled = (None if continuation is None else read_text(continuation)), PromptTemplate.of(template)
    files = [file for given in prompts for file in visible_files(given)]
    found = [prompt for file in files for prompt in _prompts_of(file, forced, filled or field)]
    if not found:
        raise UsageError("no prompt is given", "Name a text file: kvscope trace --model demo FILE")
    for prompt in found:
        if prompt.messages is None and not prompt.text.strip():
            raise UsageError(f"prompt {prompt.place} is empty", "Write some text into it.")
        if prompt.continuation == "":
            raise UsageError(
                f"the continuation of prompt {prompt.place} is empty",
                "Write some text into it, or omit it to generate.",
            )
        messages = json.dumps(prompt.messages, ensure_ascii=False)
        for text in (prompt.text, prompt.continuation or "", messages, *(prompt.answers or ())):
            require_whole(f"prompt {prompt.place}", text)
    return found


def with_answers(prompts: list[PromptText], answers: Sequence[str]) -> list[PromptText]:
    """Return the prompts with right answers that a user names, if any.

    Raises
    ------
    UsageError
        If there are several prompts, or the prompt has answers of its own; if an answer is empty.
    """
    if not answers:
        return prompts
    if len(prompts) > 1:
        raise UsageError(
            f"--answer is for one prompt, and there are {len(prompts)}",
            'Write the answers into a JSONL file: {"prompt": "...", "answers": ["..."]}',
        )
    (prompt,) = prompts
    if prompt.answers is not None:
        raise UsageError(f"prompt {prompt.place} has answers of its own", "Omit --answer.")
    if not all(answer.strip() for answer in answers):
        raise UsageError("--answer is empty", "Write what the model should say.")
    for answer in answers:
        require_whole("--answer", answer)
    return [replace(prompt, answers=tuple(answers))]


def with_images(prompts: list[PromptText], images: Sequence[str]) -> list[PromptText]:
    """Return the prompts with images that a user names beside a single prompt, if any.

    Raises
    ------
    UsageError
        If there are several prompts, or the prompt has images of its own; if it is a conversation.
    """
    if not images:
        return prompts
    if len(prompts) > 1:
        raise UsageError(
            f"--image is for one prompt, and there are {len(prompts)}",
            'Write the images into a JSONL file: {"prompt": "...", "images": ["picture.png"]}',
        )
    (prompt,) = prompts
    if prompt.images:
        raise UsageError(f"prompt {prompt.place} has images of its own", "Omit --image.")
    if prompt.messages is not None:
        raise UsageError(
            f"prompt {prompt.place} is a conversation, in which --image has no place",
            'Put {"type": "image", "path": "picture.png"} into the content of a message.',
        )
    return [replace(prompt, images=tuple(images))]


def _prompts_of(file: Path | str, forced: str | None, field: str | PromptTemplate | None) -> Iterator[PromptText]:
    name, ending = file_name(file), text_ending(file)
    if ending == PARQUET:
        yield from (_prompt(name, place, entry, forced, field) for place, entry in rows_of(file))
        return
    if ending in TABLES:
        raise UsageError(
            f"{name} is a table, not a text",
            "Convert it to JSON lines, or give it the ending .txt to use all of it as one prompt.",
        )
    content = read_exactly(file)
    if ending in LINES or ending == WHOLE or (not ending and is_objects(content)):
        entries = entries_of(name, content, lines=ending in LINES)
        if not entries:
            raise UsageError(f"{name} is empty", 'Write one prompt per line: {"prompt": "..."}')
        yield from (_prompt(name, place, entry, forced, field) for place, entry in entries)
        return
    if field is not None:
        option = f"--field {field}" if isinstance(field, str) else "--template"
        raise UsageError(f"{option}: {name} is one text without fields", "Omit it, or name a JSONL file.")
    yield PromptText(name, name, content.replace("\r\n", "\n").replace("\r", "\n"), continuation=forced)


def _prompt(name: str, place: str, entry: Json, forced: str | None, field: str | PromptTemplate | None) -> PromptText:
    if not isinstance(entry, dict):
        raise UsageError(f"{place}: no prompt: this is not an object", EXAMPLE)
    named = ""  # what the prompt was made of
    if isinstance(field, PromptTemplate):
        named, entry, field = field.text, {**entry, "prompt": field.filled(place, entry)}, "prompt"
    fields = _fields(entry) if field is None else ((field,) if field in entry else ())
    named = named or "+".join(fields)
    if not fields:
        what = "no prompt" if field is None else f"no field {field}"
        raise UsageError(f"{place}: {what} among its fields ({', '.join(entry) or 'none'})", EXAMPLE)
    following = entry.get("continuation")
    if not isinstance(following, str | None):
        raise UsageError(f"{place}: the continuation is not a text", 'Write "continuation": "..."')
    following = forced if following is None else following.lstrip(BOM)
    answers, folder = _answers(entry), _folder(name)
    images = images_beside(place, entry, folder)
    if isinstance(entry[fields[0]], list):
        messages, images = images_within(place, _messages(place, entry[fields[0]]), images, folder)
        facts = example_facts(place, with_benchmark(name, entry))
        return PromptText(name, place, "", messages, following, answers, named, facts, images=images)
    parts = [entry[each] for each in fields]
    texts = [part.lstrip(BOM) for part in parts if isinstance(part, str)]
    if len(texts) < len(parts):
        raise UsageError(f"{place}: no prompt: {named} is not a text", EXAMPLE)
    text = "\n\n".join(filter(None, texts))
    facts, spans = example_facts(place, with_benchmark(name, entry)), text_spans(place, entry, text)
    return PromptText(name, place, text, None, following, answers, named, facts, spans, images)


def _folder(name: str) -> Path | None:
    """Return the folder of a file of prompts, to which its images are relative; None for standard input."""
    return None if name == file_name(STANDARD_INPUT) else Path(name).parent


def _fields(entry: JsonDict) -> tuple[str, ...]:
    """Return the fields of a prompt's text, whose values are joined by an empty line, or of its messages."""
    for one in ("prompt", "messages"):
        if one in entry:
            return (one,)
    if "context" in entry:
        return ("context", *[each for each in QUESTIONS if each in entry][:1])
    return tuple([each for each in ("input", "text", "question") if each in entry][:1])


def _messages(place: str, value: Json) -> tuple[Message, ...]:
    """Return a conversation; raises UsageError unless every message has a role and a content."""
    assert isinstance(value, list), "the caller checks it"
    if not value:
        raise UsageError(f"prompt {place} is empty: it has no messages", "Write a message into it.")
    messages: list[Message] = []
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UsageError(
                f"{place}: a message has no role", 'Write messages: [{"role": "user", "content": "..."}, ...]'
            )
        content = message.get("content")
        if isinstance(content, str):
            message = {**message, "content": content.lstrip(BOM)}
        messages.append(message)
    return tuple(messages)


def _answers(entry: JsonDict) -> tuple[str, ...] | None:
    """Return the right answers that an object has, as texts; None if it has none."""
    for name in ANSWERS:
        if name in entry and entry[name] is not None:
            value = entry[name]
            values = value if isinstance(value, list) else [value]
            return tuple(one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in values)
    return None

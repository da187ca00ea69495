"""Render conversations with a model's chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from kvscope.core.errors import KvscopeError, ModelError, UsageError
from kvscope.core.json import Json
from kvscope.core.model_types import Processor, Tokenizer
from kvscope.model.explain import first_line
from kvscope.model.image_parts import Message
from kvscope.model.loading import Loaded
from kvscope.model.prompt_files import PromptText

RESERVED = frozenset(
    "messages conversation chat_template tools documents add_generation_prompt continue_final_message tokenize padding "
    "sanitize_control_tokens truncation max_length return_tensors return_dict return_assistant_tokens_mask "
    "tokenizer_kwargs".split()
)


def render(loaded: Loaded, prompt: PromptText, system: str | None, options: Mapping[str, Json]) -> str:
    """Return the text of a conversation, or of a prompt as the only message of one, by the model's chat template.

    The template ends it with the beginning of an answer; an answer with which the conversation ends is to be continued.
    Contents are passed as they are, and in their other form, text or a list of parts, if the template fails on it or
    omits them.

    Raises
    ------
    UsageError
        If the model has no template, or the template has no such option; if the conversation has a system message
        beside `system`.
    ModelError
        If the template raises an error, or renders nothing.
    """
    messages = _messages(prompt, system, prompt.text)
    _require_options(loaded, options)
    failure: Exception | None = None
    rendered: list[str] = []
    for form in (messages, _other_form(messages, prompt.place)):
        try:
            text = _apply(loaded.tokenizer, form, options)
        except KvscopeError:
            raise
        except Exception as error:  # templates raise errors of jinja2 and of Python
            failure = failure or error
            continue
        if _has_contents(text, messages):
            return text
        rendered.append(text)
    if rendered and rendered[0].strip():
        return rendered[0]
    if failure is not None:
        raise _refused(loaded, prompt, failure) from failure
    raise ModelError(f"the chat template of {loaded.name} renders {prompt.place} as nothing", "Omit --chat.")


def render_with_images(
    loaded: Loaded, processor: Processor, prompt: PromptText, system: str | None, options: Mapping[str, Json]
) -> str:
    """Return the text of a conversation with images: each is where the template writes the placeholder of an image.

    The template is the processor's, or the tokenizer's where the processor has none. A text becomes one message: its
    images, then the text.

    Raises
    ------
    UsageError, ModelError
        As `render`.
    """
    texts: list[Json] = [{"type": "text", "text": prompt.text}]
    images: list[Json] = [{"type": "image"} for _ in prompt.images]
    messages = _messages(prompt, system, images + texts)
    owner = processor if getattr(processor, "chat_template", None) else loaded.tokenizer
    _require_options(loaded, options, owner)
    try:
        text = _apply(owner, _as_parts(messages), options)
    except Exception as error:  # templates raise errors of jinja2 and of Python
        raise _refused(loaded, prompt, error) from error
    if not text.strip():
        raise ModelError(f"the chat template of {loaded.name} renders {prompt.place} as nothing", "Omit --chat.")
    return text


def _refused(loaded: Loaded, prompt: PromptText, error: Exception) -> ModelError:
    """Return the error for a template that fails: whatever the conversation, if it is not a template at all."""
    if any(kind.__name__ == "TemplateSyntaxError" for kind in type(error).__mro__):  # of jinja2, as transformers has it
        return ModelError(f"the chat template of {loaded.name} cannot be used: {first_line(error)}", "Omit --chat.")
    return ModelError(
        f"the chat template of {loaded.name} refuses {prompt.place}: {first_line(error)}",
        "Change the conversation, or set what the template needs with --chat-option.",
    )


def _messages(prompt: PromptText, system: str | None, content: Json) -> list[Message]:
    """Return the messages of a prompt, after a system message; `content` is that of a prompt without messages."""
    messages: list[Message] = list(prompt.messages or [{"role": "user", "content": content}])
    if system is not None:
        if any(message["role"] == "system" for message in messages):
            raise UsageError(f"{prompt.place} has a system message of its own", "Omit --system.")
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _as_parts(messages: Sequence[Message]) -> list[Message]:
    """Return messages with every text as a list of one part, as templates for images read them."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _apply(owner: Tokenizer | Processor, messages: Sequence[Message], options: Mapping[str, Json]) -> str:
    continued = messages[-1]["role"] == "assistant"
    text = owner.apply_chat_template(
        list(messages),
        tokenize=False,
        add_generation_prompt=not continued,
        continue_final_message=continued,
        **options,
    )
    return str(text)


def _require_options(loaded: Loaded, options: Mapping[str, Json], owner: Processor | None = None) -> None:
    """Raise UsageError unless the model has a chat template, of `owner` or its tokenizer, that reads all options."""
    owner = loaded.tokenizer if owner is None else owner
    if not getattr(owner, "chat_template", None):
        raise UsageError(f"model {loaded.name} has no chat template", "Omit --chat, or trace a chat model.")
    try:
        read = getattr(owner, "get_chat_template", None)  # a processor has none
        template = str(read() if read is not None else owner.chat_template)
    except Exception as error:
        raise ModelError(
            f"the chat template of {loaded.name} cannot be used: {first_line(error)}", "Omit --chat."
        ) from error
    for name in options:
        if name in RESERVED:
            raise UsageError(f"--chat-option {name} is set by kvscope itself", "Omit it.")
        if not re.search(rf"\b{re.escape(name)}\b", template):
            raise UsageError(f"the chat template of {loaded.name} reads no option {name}", "Omit it, or correct it.")


def _other_form(messages: Sequence[Message], place: str) -> list[Message]:
    """Return messages with texts as lists of one part, and lists of parts as texts."""
    changed: list[Message] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            changed.append({**message, "content": [{"type": "text", "text": content}]})
        elif isinstance(content, list):
            changed.append({**message, "content": "".join(_texts(content, place))})
        else:
            changed.append(message)
    return changed


def _has_contents(rendered: str, messages: Sequence[Message]) -> bool:
    """Return whether a rendered text contains the texts of the last message, without spaces around them."""
    content = messages[-1].get("content")
    texts = [content] if isinstance(content, str) else _texts(content, "") if isinstance(content, list) else []
    return all(text.strip() in rendered for text in texts)


def _texts(parts: Sequence[Json], place: str) -> list[str]:
    """Return the texts of parts; raises UsageError for a part that is no text."""
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise UsageError(f"{place}: a message has a part that is not a text", "Write parts of type text only.")
        texts.append(text)
    return texts

"""Chat templates: whole conversations, options, contents as texts or parts, and the template's own errors."""

from typing import Any

import pytest

from kvscope.core.errors import ModelError, UsageError
from kvscope.core.recording_options import TextOptions
from kvscope.model.chat import render
from kvscope.model.loading import Loaded
from kvscope.model.prompt_files import PromptText
from kvscope.model.prompts import encode
from tests.model.tiny import build
from tests.model.tokenizer_kinds import make

TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
THINKING = TURNS + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
PARTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}<|assistant|>"
)
STRICT_PARTS = PARTS.replace("{% if p['type']", "{{ p['type'] + '' if p is mapping else p.type.x }}{% if p['type']")
STRINGS = TURNS.replace("m['content']", "m['content'].strip()")
RAISES = "{{ raise_exception('Conversation roles must alternate') }}"


def loaded(template: str | None, affix: str = "bos") -> Loaded:
    tokenizer = make("byte-level", affix)
    tokenizer.chat_template = template
    return Loaded(build("llama"), tokenizer, "tiny", "tiny", None)


def chat(*turns: tuple[str, Any]) -> PromptText:
    return PromptText("p", "p, line 1", "", tuple({"role": role, "content": content} for role, content in turns))


TEXT = PromptText("p", "p", "Hello")


def test_a_prompt_and_a_conversation() -> None:
    assert render(loaded(TURNS), TEXT, None, {}) == "<|user|>Hello<|assistant|>"
    assert render(loaded(TURNS), TEXT, "Be brief", {}) == "<|system|>Be brief<|user|>Hello<|assistant|>"
    turns = chat(("system", "A"), ("user", "B"), ("assistant", "C"), ("user", "D"))
    assert render(loaded(TURNS), turns, None, {}) == "<|system|>A<|user|>B<|assistant|>C<|user|>D<|assistant|>"
    with pytest.raises(UsageError, match="p, line 1 has a system message of its own"):
        render(loaded(TURNS), turns, "Be brief", {})


def test_an_answer_at_the_end_is_continued() -> None:
    turns = chat(("user", "B"), ("assistant", "The answer"))
    assert render(loaded(TURNS + "</s>"), turns, None, {}) == "<|user|>B<|assistant|>The answer"


def test_options_of_the_template() -> None:
    assert render(loaded(THINKING), TEXT, None, {"enable_thinking": False}).endswith("<|assistant|><think></think>")
    assert render(loaded(THINKING), TEXT, None, {"enable_thinking": True}).endswith("<|assistant|>")
    with pytest.raises(UsageError, match=r"reads no option enable_thinkin\n"):
        render(loaded(THINKING), TEXT, None, {"enable_thinkin": False})
    with pytest.raises(UsageError, match="tokenize is set by kvscope"):
        render(loaded(THINKING), TEXT, None, {"tokenize": True})


@pytest.mark.parametrize("template", [PARTS, STRICT_PARTS])
def test_contents_as_lists_where_the_template_needs_them(template: str) -> None:
    assert "Hello" in render(loaded(template), TEXT, None, {})
    assert "Be brief" in render(loaded(template), TEXT, "Be brief", {})


def test_contents_as_texts_where_the_template_needs_them() -> None:
    parts = [{"type": "text", "text": "One, "}, {"type": "text", "text": "two"}]
    assert render(loaded(STRINGS), chat(("user", parts)), None, {}) == "<|user|>One, two<|assistant|>"
    assert "One, two" in render(loaded(PARTS), chat(("user", parts)), None, {})
    with pytest.raises(UsageError, match="a part that is not a text"):
        render(loaded(STRINGS), chat(("user", [{"type": "image", "url": "a"}])), None, {})


def test_errors_of_templates_are_named() -> None:
    with pytest.raises(ModelError, match="template of tiny refuses p: Conversation roles must alternate") as caught:
        render(loaded(RAISES), TEXT, None, {})
    assert caught.value.todo
    with pytest.raises(ModelError, match="renders p as nothing"):
        render(loaded("{% if false %}x{% endif %}"), TEXT, None, {})
    with pytest.raises(ModelError, match="template of tiny cannot be used") as caught:
        render(loaded("{% for %}"), TEXT, None, {})
    assert caught.value.todo == "Omit --chat.", "no conversation makes a template of it"
    with pytest.raises(UsageError, match="no chat template"):
        render(loaded(None), TEXT, None, {})


def test_a_rendered_text_has_one_bos() -> None:
    bos = loaded("{{ bos_token }}" + TURNS)
    made = encode(bos, TEXT, TextOptions(chat=True, max_new_tokens=2))
    assert bos.tokenizer.convert_ids_to_tokens(made.ids)[:2] == ["<s>", "<|user|>"]
    assert made.text == "<s><|user|>Hello<|assistant|>" and made.rendered and made.notes == ()
    pasted = encode(bos, PromptText("p", "p", made.text), TextOptions(max_new_tokens=2))
    assert pasted.ids == made.ids
    assert pasted.notes == ("prompt p begins with <s>: none is added",)
    plain = encode(bos, TEXT, TextOptions(max_new_tokens=2))
    assert bos.tokenizer.convert_ids_to_tokens(plain.ids)[0] == "<s>" and plain.notes == ()


def test_half_characters_in_options() -> None:
    with pytest.raises(UsageError, match="prompt p contains half a character"):
        encode(loaded(TURNS), TEXT, TextOptions(chat=True, system="\ud83d"))


def test_options_of_chats_without_a_chat() -> None:
    for options in (TextOptions(system="a"), TextOptions(chat_options={"a": 1})):
        with pytest.raises(UsageError, match="p is a text"):
            encode(loaded(TURNS), TEXT, options)


def test_notes_on_the_ends_of_prompts() -> None:
    made = encode(loaded(None), PromptText("p", "p", "Once</s>"), TextOptions(max_new_tokens=2))
    assert made.notes == ("prompt p ends with </s>: the model generates after it",)
    made = encode(loaded(None), PromptText("p", "p", "Once upon a ti", continuation="me"), TextOptions())
    assert len(made.notes) == 1 and "merge with the continuation" in made.notes[0]
    with pytest.raises(UsageError, match="merge into the same tokens"):
        encode(loaded(None, "none"), PromptText("p", "p", "On", continuation="ce"), TextOptions())

"""Text becomes token ids by one rule, whatever the tokenizer: prefix once, no EOS, no space that is not in the text."""

import pytest

from kvscope.core.errors import ModelError, UsageError
from kvscope.model.prompts import token_texts
from kvscope.model.token_ids import TextEncoder, windows
from tests.model.tokenizer_kinds import AFFIXES, KINDS, make

PREFIX = {"none": [], "bos": ["<s>"], "eos": [], "both": ["<s>"], "own": ["[gMASK]", "<sop>"]}
PAIRS = [
    ("Once upon a time", " there was a house"),
    ("The answer is ", "42."),
    ("The answer is", "42."),
    ("What is the question?\n", "Nobody could say"),
    ("Once upon a ti", "me"),
    ("the house", "."),
]


def decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("affix", AFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_prefix_once_and_no_eos(kind: str, affix: str) -> None:
    tokenizer = make(kind, affix)
    encoder = TextEncoder(tokenizer)
    assert tokenizer.convert_ids_to_tokens(encoder.prefix) == PREFIX[affix]
    body = encoder.encode("Once upon a time")
    assert body == tokenizer("Once upon a time", add_special_tokens=False)["input_ids"]
    assert tokenizer.eos_token_id not in [*encoder.prefix, *body]
    written = encoder.encode("".join(PREFIX[affix]) + "Once upon a time")
    assert encoder.writes_prefix(written) == bool(PREFIX[affix])
    assert not encoder.writes_prefix(encoder.without_prefix(written))


@pytest.mark.parametrize("affix", AFFIXES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "continuation"), PAIRS)
def test_prompt_and_continuation_are_one_text(kind: str, affix: str, prompt: str, continuation: str) -> None:
    tokenizer = make(kind, affix)
    encoder = TextEncoder(tokenizer)
    ids, forced = encoder.split(prompt, continuation)
    assert ids + forced == tokenizer(prompt + continuation, add_special_tokens=False)["input_ids"]
    assert ids and forced
    if kind != "word-piece":  # its tokens do not hold the spaces of a text
        assert decoded(tokenizer, ids + forced) == prompt + continuation
        assert (prompt + continuation).startswith(decoded(tokenizer, ids))
    own = encoder.encode(prompt)
    assert ids == own[: len(ids)] and len(own) - len(ids) <= 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_continuation_of_a_whole_word_leaves_the_prompt_as_it_is(kind: str) -> None:
    tokenizer = make(kind, "bos")
    encoder = TextEncoder(tokenizer)
    ids, forced = encoder.split("Once upon a time", " there was")
    assert ids == encoder.encode("Once upon a time")
    assert "▁▁" not in "".join(tokenizer.convert_ids_to_tokens(ids + forced))


@pytest.mark.parametrize("affix", AFFIXES)
@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_one_text_with_the_prefix_before_each(kind: str, affix: str) -> None:
    encoder = TextEncoder(make(kind, affix))
    ids = encoder.encode("Once upon a time there was a small house by the sea. " * 3)
    parts = list(windows(encoder, ids, 10))
    first = len(encoder.prefix)
    assert [part[:first] for part in parts] == [encoder.prefix] * len(parts)
    assert [one for part in parts for one in part[first:]] == ids
    assert {len(part) for part in parts[:-1]} == {10}


def test_a_prefix_that_fills_the_window() -> None:
    encoder = TextEncoder(make("byte-level", "own"))
    with pytest.raises(UsageError, match="no room beside the 2"):
        list(windows(encoder, [1, 2, 3], 2))


def test_special_tokens_in_a_text_are_read_as_such() -> None:
    tokenizer = make("byte-level", "bos")
    assert tokenizer.convert_ids_to_tokens(TextEncoder(tokenizer).encode("<|user|>a")) == ["<|user|>", "a"]


class AlwaysBos:
    """A tokenizer that adds BOS whatever it is asked for, as some tokenizers of remote code do."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(ord, text)]}


class Panics:
    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        raise self.error

    def __init__(self, error: BaseException) -> None:
        self.error = error


def test_a_tokenizer_that_always_adds_bos() -> None:
    encoder = TextEncoder(AlwaysBos())
    assert encoder.prefix == [1]
    assert encoder.encode("ab") == [ord("a"), ord("b")]
    assert encoder.split("a", "b") == ([ord("a")], [ord("b")])


def test_failures_of_tokenizers_are_explained() -> None:
    class Panic(BaseException):
        """As pyo3 raises."""

    for error in (Exception("no merges"), TypeError("no merges"), Panic("no merges")):
        with pytest.raises(ModelError, match="the tokenizer Panics failed: no merges"):
            TextEncoder(Panics(error))
    with pytest.raises(KeyboardInterrupt):
        TextEncoder(Panics(KeyboardInterrupt()))


@pytest.mark.parametrize(
    ("kind", "decoder"),
    [(kind, True) for kind in KINDS] + [(kind, False) for kind in KINDS if kind != "word-piece"],  # it marks no spaces
)
def test_token_texts_show_no_space_marks(kind: str, decoder: bool) -> None:
    tokenizer = make(kind, "bos")
    text = "Once upon a time there was 世界🙂 ża"
    ids = TextEncoder(tokenizer).encode(text)
    if not decoder:
        tokenizer.backend_tokenizer.decoder = None
    parts = token_texts(tokenizer, ids)
    assert len(parts) == len(ids)
    assert not any(mark in part for part in parts for mark in "▁Ġ")
    if kind == "byte-level" or (decoder and kind.startswith("metaspace")):
        assert "".join(parts) == text

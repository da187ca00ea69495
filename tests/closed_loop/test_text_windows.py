"""Windows of texts: the prefix before each, and every token that is not scored is counted and named."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvscope.closed_loop.passage import scored_tokens
from kvscope.closed_loop.perplexity import passages_of_texts
from kvscope.core.errors import UsageError
from kvscope.core.options import PerplexityOptions, Prefill
from tests.model.tokenizer_kinds import make

TEXT = "Once upon a time there was a small house by the sea. " * 4


def loaded(affix: str) -> Any:
    return SimpleNamespace(tokenizer=make("byte-level", affix), context=64)


def ids_of(text: str) -> list[int]:
    return make("byte-level")(text)["input_ids"]


@pytest.mark.parametrize(("affix", "prefix"), [("none", 0), ("bos", 1), ("eos", 0), ("both", 1), ("own", 2)])
def test_every_window_begins_with_the_prefix(affix: str, prefix: int) -> None:
    read = passages_of_texts(loaded(affix), {Path("a"): TEXT}, PerplexityOptions(window=16))
    parts = [passage.ids.tolist() for passage in read.passages]
    assert all(part[:prefix] == parts[0][:prefix] for part in parts)
    text = [one for part in parts for one in part[prefix:]]
    whole = ids_of(TEXT)
    assert text == whole[: len(text)] and read.dropped == {Path("a"): len(whole) - len(text)}
    assert make("byte-level").eos_token_id not in text


@pytest.mark.parametrize(("affix", "prefix"), [("none", 0), ("bos", 1), ("both", 1), ("own", 2)])
@pytest.mark.parametrize("prompt", [1, 2, 5])
def test_every_token_of_the_text_is_scored_and_none_of_the_prefix(affix: str, prefix: int, prompt: int) -> None:
    options = PerplexityOptions(window=16, prompt=prompt)
    read = passages_of_texts(loaded(affix), {Path("a"): TEXT}, options)
    whole, seen = ids_of(TEXT), 0
    for passage in read.passages:
        scored = scored_tokens(passage, Prefill.stream if prompt == 1 else Prefill.full)
        first = max(prompt, prefix)
        assert scored.tolist() == list(range(first, len(passage.ids)))
        text = passage.ids[prefix:].tolist()
        assert passage.ids[scored].tolist() == whole[seen : seen + len(text)][first - prefix :]
        seen += len(text)


def test_a_text_with_its_own_prefix_has_it_once() -> None:
    plain = passages_of_texts(loaded("bos"), {Path("a"): TEXT}, PerplexityOptions(window=16))
    written = passages_of_texts(loaded("bos"), {Path("a"): "<s>" + TEXT}, PerplexityOptions(window=16))
    assert [one.ids.tolist() for one in written.passages] == [one.ids.tolist() for one in plain.passages]


def test_tokens_that_are_not_scored_are_named() -> None:
    count = len(ids_of(TEXT))
    window = next(size for size in range(12, 40) if 0 < count % size <= 8)
    texts = {Path("a"): TEXT, Path("b"): TEXT}
    read = passages_of_texts(loaded("none"), texts, PerplexityOptions(window=window))
    assert read.dropped == dict.fromkeys(texts, count % window)
    assert read.notes[0] == f"a: its last {count % window} tokens are not scored: they are too few for a window"
    exact = next(size for size in range(12, 40) if not 0 < count % size <= 8)
    assert passages_of_texts(loaded("none"), texts, PerplexityOptions(window=exact)).notes == ()
    few = passages_of_texts(loaded("none"), texts, PerplexityOptions(window=window, max_windows=1))
    assert few.notes == () and len(few.passages) == 2


def test_a_short_text_after_a_long_one_is_refused() -> None:
    with pytest.raises(UsageError, match="text b has too few tokens"):
        passages_of_texts(loaded("none"), {Path("a"): TEXT, Path("b"): "Once"}, PerplexityOptions(window=16))


@pytest.mark.parametrize("window", [1, 8])
def test_a_window_that_is_too_short_is_named(window: int) -> None:
    options = PerplexityOptions(window=window)
    with pytest.raises(UsageError, match=f"a window of {window} tokens is too short") as refused:
        passages_of_texts(loaded("none"), {Path("a"): TEXT}, options)
    assert "--window more than 8" in str(refused.value.todo)
    assert passages_of_texts(loaded("none"), {Path("a"): TEXT}, PerplexityOptions(window=9)).passages

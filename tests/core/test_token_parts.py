"""A token that is a part of a character is shown with that character."""

import pytest

from kvscope.core.token_parts import shown_parts
from kvscope.model.prompts import token_texts
from kvscope.model.token_ids import TextEncoder
from tests.model.tokenizer_kinds import make


@pytest.mark.parametrize(
    ("texts", "shown"),
    [
        (["a", " b"], ["a", " b"]),
        (["", "", "界"], ["界 1/3", "界 2/3", "界 3/3"]),
        (["", " ż", "", "ó!"], [" ż 1/2", "ż 2/2", "ó 1/2", "ó 2/2!"]),
        (["", "a", ""], ["", "a", ""]),  # tokens of no text, as some special tokens are
        (["", "\ufffd"], ["\ufffd 1/2", "\ufffd 2/2"]),  # a sequence that ends inside a character
        ([], []),
    ],
)
def test_parts_of_characters(texts: list[str], shown: list[str]) -> None:
    assert shown_parts(texts) == shown


@pytest.mark.parametrize("kind", ["metaspace-first", "metaspace-never"])
def test_bytes_of_a_real_tokenizer(kind: str) -> None:
    tokenizer = make(kind)
    ids = TextEncoder(tokenizer).encode("the 世界")
    assert shown_parts(token_texts(tokenizer, ids))[-6:] == [f"{one} {part}/3" for one in "世界" for part in (1, 2, 3)]

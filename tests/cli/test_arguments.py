"""What the words of a command line mean, before any room is asked."""

import pytest

from kvscope.cli.parameters import split
from kvscope.cli.trace import _numbers as numbers
from kvscope.core.errors import UsageError


@pytest.mark.parametrize(
    ("given", "words", "params"),
    [
        ([], [], {}),
        (["traces/a"], ["traces/a"], {}),
        (["a", "b"], ["a", "b"], {}),
        (["--alpha", "0.7"], [], {"alpha": "0.7"}),
        (["--alpha=0.7", "a"], ["a"], {"alpha": "0.7"}),
        (["--alpha", "-1", "a"], ["a"], {"alpha": "-1"}),  # a negative number is a value, the policy judges it
        (["--compare-every", "5"], [], {"compare_every": "5"}),
        (["--base=a=b"], [], {"base": "a=b"}),
    ],
)
def test_split(given: list[str], words: list[str], params: dict[str, str]) -> None:
    assert split(given) == (words, params)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--alpha"], "--alpha has no value"),
        (["--alpha", "--recent", "3"], "--alpha has no value"),
        (["--alpha", "1", "--alpha", "2"], "--alpha is given twice"),
        (["-z"], "unknown option -z"),
        (["--"], "unknown option --"),
    ],
)
def test_split_refuses(words: list[str], what: str) -> None:
    with pytest.raises(UsageError) as caught:
        split(words)
    assert caught.value.what == what
    assert caught.value.todo


def test_numbers() -> None:
    assert numbers("--layers", None) is None
    assert numbers("--layers", "0") == (0,)
    assert numbers("--heads", "3, 0,8-10,9") == (0, 3, 8, 9, 10)


@pytest.mark.parametrize("text", ["", "a", "1,", "3-1", "1-", "-1", "1.5"])
def test_numbers_refuses(text: str) -> None:
    with pytest.raises(UsageError, match="is not a layer"):
        numbers("--layers", text)

"""Budgets: one owner of parsing and rounding, so that 20 % means the same number of keys everywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvscope.core.budget import Budget, parse_budgets
from kvscope.core.errors import UsageError


@pytest.mark.parametrize(
    ("text", "prefill", "keys"),
    [
        ("20%", "full", 103),
        ("20%", "stream", 131),
        ("256", "full", 256),
        (256, "stream", 256),
        ("0.1%", "full", 1),
        ("12.5%", "full", 65),
        ("100%", "full", 515),
        ("1", "full", 1),
    ],
)
def test_keys(text, prefill, keys) -> None:
    assert Budget.parse(text).keys(prompt=515, length=651, prefill=prefill) == keys


@given(st.integers(1, 100), st.integers(1, 10_000))
def test_a_share_is_rounded_up_exactly(percent: int, prompt: int) -> None:
    """0.07 * 100 is 7.000000000000001 in binary: a float would give one key too many."""
    assert Budget.parse(f"{percent}%").keys(prompt=prompt, length=prompt, prefill="full") == -(-percent * prompt // 100)


@pytest.mark.parametrize(
    "text", ["0.2", "1.0", "0", "-3", "0%", "101%", "abc", "", "%", "nan", "inf%", 1.5, True, None]
)
def test_what_is_no_budget(text) -> None:
    with pytest.raises(UsageError) as caught:
        Budget.parse(text)
    assert caught.value.exit_status == 2
    assert "percent sign" in caught.value.todo


def test_lists() -> None:
    assert [str(budget) for budget in parse_budgets("20%, 256,20%")] == ["20%", "256"]
    with pytest.raises(UsageError, match="no budget"):
        parse_budgets(",")

"""How a quantised cache is written, and what is refused."""

from __future__ import annotations

import msgspec
import pytest

from kvscope.core.cache_scheme import CacheScheme, CacheText, parse_cache, parse_caches
from kvscope.core.errors import UsageError

WRITTEN = {
    "int4": CacheScheme("kivi", 4),
    "int4:kivi": CacheScheme("kivi", 4),
    "INT2:KIVI(group=16, residual=64)": CacheScheme("kivi", 2, 16, 64),
    "int3:kvquant(outliers=0.5%,first=0)": CacheScheme("kvquant", 3, outliers=0.005, first=0),
    "int4:quanto": CacheScheme("quanto", 4, 64),
    "int2:quanto(group=32,residual=64)": CacheScheme("quanto", 2, 32, 64),
    "fp8": CacheScheme("fp8", 8),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_what_is_written_is_read_again(text: str) -> None:
    scheme = parse_cache(text)
    assert scheme == WRITTEN[text]
    assert parse_cache(str(scheme)) == scheme == parse_cache(scheme.text)
    assert msgspec.convert(scheme.text, CacheText) == scheme.text


def test_lists() -> None:
    assert parse_caches("16bit,int4:kivi(group=32,residual=64),fp8") == (
        None,
        CacheScheme("kivi", 4, 32, 64),
        CacheScheme("fp8", 8),
    )
    assert parse_caches(("none", "int2,int8")) == (None, CacheScheme("kivi", 2), CacheScheme("kivi", 8))
    assert parse_caches(()) == ()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("int5", "has codes of 5 bits"),
        ("int3:quanto", "has codes of 3 bits"),
        ("int4:quanto(outliers=1%)", "has no parameter 'outliers'"),
        ("int4:squeeze", "unknown kind 'squeeze'"),
        ("four bits", "cache 'four bits' is unknown"),
        ("int4:kivi(group=32", "is unknown"),
        ("int4:kivi(outliers=1%)", "has no parameter 'outliers'"),
        ("fp8(group=3)", "has no parameter 'group'"),
        ("int4:kivi(group=0)", "group=0 of a cache is not in its range"),
        ("int4:kivi(group=many)", "group=many of a cache is not in its range"),
        ("int4:kvquant(outliers=60%)", "outliers=60% of a cache is not in its range"),
        ("int4:kivi(group=32,residual=48)", "groups of 32 do not divide"),
        ("int4,int4:kivi", "names a cache twice"),
    ],
)
def test_what_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_caches(text)
    assert why in caught.value.what and caught.value.todo


@pytest.mark.parametrize(
    "text", ["", "int4", "int5:kivi(group=32,residual=128)", "int4:kivi(group=0,residual=128)", "fp8 "]
)
def test_damaged_records_are_refused(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(text, CacheText)


def test_when_keys_and_values_become_codes() -> None:
    """KIVI: keys whenever `residual` more have come; values one by one, `residual` steps late."""
    kivi = CacheScheme("kivi", 4, 2, 4)
    assert [kivi.coded_keys(tokens, 3) for tokens in range(10)] == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert [kivi.coded_values(tokens, 3) for tokens in range(10)] == [0, 0, 0, 0, 0, 1, 2, 3, 4, 5]
    fp8 = CacheScheme("fp8", 8)
    assert [(fp8.coded_keys(t, 0), fp8.coded_values(t, 0)) for t in (0, 1, 7)] == [(0, 0), (1, 1), (7, 7)]
    quanto = CacheScheme("quanto", 4, 64, 3)
    assert [quanto.coded_keys(tokens, 5) for tokens in range(5, 13)] == [5, 5, 5, 8, 8, 8, 11, 11]
    assert [quanto.coded_values(tokens, 0) for tokens in range(9)] == [0, 1, 1, 1, 4, 4, 4, 7, 7]

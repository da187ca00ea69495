"""How merging is written, and what is refused."""

from __future__ import annotations

import msgspec
import pytest

from kvscope.core.cache_scheme import parse_caches
from kvscope.core.errors import UsageError
from kvscope.core.merge_scheme import MergeScheme, MergeText, parse_merge, parse_merges

WRITTEN = {
    "cam": MergeScheme("cam"),
    "CaM(tokens=4, seed=7)": MergeScheme("cam", tokens=4, seed=7),
    "cam(chance=max)": MergeScheme("cam", chance="max"),
    "d2o(beta=0.7)": MergeScheme("d2o", beta=0.7),
    "d2o(beta=1)": MergeScheme("d2o", beta=1.0),
    "kvmerger(threshold=.9)": MergeScheme("kvmerger", threshold=0.9),
    "kvmerger(threshold=0)": MergeScheme("kvmerger", threshold=0.0),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_what_is_written_is_read_again(text: str) -> None:
    scheme = parse_merge(text)
    assert scheme == WRITTEN[text]
    assert parse_merge(str(scheme)) == scheme == parse_merge(scheme.text)
    assert msgspec.convert(scheme.text, MergeText) == scheme.text


def test_lists() -> None:
    cam = MergeScheme("cam", tokens=8, seed=1)
    assert parse_merges("none,cam(tokens=8,seed=1),d2o") == (None, cam, MergeScheme("d2o"))
    assert parse_merges(("none", "d2o,kvmerger")) == (None, MergeScheme("d2o"), MergeScheme("kvmerger"))
    assert parse_merges(()) == ()
    assert parse_merges("none", parse_caches("int4")) == (None,)
    assert str(MergeScheme("cam")) == "cam" and MergeScheme("cam").text == "cam(tokens=16,chance=mean,seed=0)"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("ema", "merging rule 'ema' is unknown"),
        ("cam(tokens=2", "is unknown"),
        ("", "merging rule '' is unknown"),
        ("d2o(tokens=2)", "d2o has no parameter 'tokens'"),
        ("cam(tokens=0)", "tokens=0 of the merging rule cam is not in its range"),
        ("cam(seed=-1)", "seed=-1 of the merging rule cam is not in its range"),
        ("cam(chance=least)", "chance=least of the merging rule cam is not in its range"),
        ("d2o(beta=1.5)", "beta=1.5 of the merging rule d2o is not in its range"),
        ("kvmerger(threshold=high)", "threshold=high of the merging rule kvmerger is not in its range"),
        ("d2o,d2o(beta=0.5)", "names a rule twice"),
    ],
)
def test_what_is_refused(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_merges(text)
    assert why in caught.value.what and caught.value.todo


def test_quantised_caches_are_not_merged() -> None:
    with pytest.raises(UsageError, match="d2o cannot be combined with a cache in int4:kivi"):
        parse_merges("none,d2o", parse_caches("16bit,int4"))


@pytest.mark.parametrize("text", ["", "cam", "cam(tokens=0,chance=mean,seed=0)", "d2o(beta=1.5)", "d2o(beta=0.5) "])
def test_damaged_records_are_refused(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(text, MergeText)

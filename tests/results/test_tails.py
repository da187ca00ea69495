"""Tails against plain loops; what has no value is in none of them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.results.tails import OF, TailCounter
from tests.reference import tails as reference
from tests.results.make import make


@given(seed=st.integers(0, 10_000), steps=st.integers(1, 8), pieces=st.integers(1, 8), missing=st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_tails_equal_the_plain_loop(seed, steps, pieces, missing) -> None:
    random = np.random.default_rng(seed)
    found = TailCounter()
    given: dict[tuple[int, int], list[list[float | None]]] = {}
    for place in [(0, 0), (0, 2), (1, 0), (1, 2)]:
        values = np.round(random.random((3, steps)), 1)
        values[random.random((3, steps)) < missing] = np.nan
        given[place] = [[None if math.isnan(x) else float(x) for x in row] for row in values]
        for start in range(0, steps, pieces):
            part = slice(start, start + pieces)
            found.add(7, *place, np.arange(20, 20 + steps)[part], {"retained_mass": values[:, part]})
    got = found.of(7)
    if all(x is None for rows in given.values() for row in rows for x in row):
        assert got == {}
        return
    own = got["retained_mass"]
    for name, value in reference.tails(given).items():
        assert getattr(own, name) == pytest.approx(value), name
    at = own.worst_step_at
    assert given[at.sequence, at.layer][at.head][at.step - 20] == pytest.approx(at.value)
    assert at.value == min(x for rows in given.values() for row in rows for x in row if x is not None)
    where = own.worst_head_at
    means = [
        np.mean([x for x in given[sequence, where.layer][where.head] if x is not None])
        for sequence in (0, 1)
        if any(x is not None for x in given[sequence, where.layer][where.head])
    ]
    assert np.mean(means) == pytest.approx(own.worst_head)


def test_of_a_run_that_is_not_there() -> None:
    assert TailCounter().of(3) == {}


def test_the_summary_has_them(tmp_path: Path) -> None:
    replay = make(tmp_path / "r", [9, 5])
    for run in json.loads((tmp_path / "r" / "summary.json").read_text())["runs"]:
        (name,) = run["tails"]
        assert name == OF[0]
        values = replay.fidelity(run["run"])["retained_mass"].dropna()
        assert run["tails"][name]["worst_step_at"]["value"] == pytest.approx(values.min())
        assert 0 < run["tails"][name]["share_below_half"] < 1

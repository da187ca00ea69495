"""Residency intervals against their definition, one key and one step at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.core.residency import NEVER, ResidencyIntervals
from tests.reference.residency import resident

HEADS, LENGTH = 2, 7
# steps at which a key comes and goes in turn; an odd number of them ends in an interval that lasts to the end
TURNS = st.lists(st.integers(0, LENGTH - 1), max_size=5, unique=True).map(sorted)
DRAWN = st.dictionaries(st.tuples(st.integers(0, HEADS - 1), st.integers(0, LENGTH - 1)), TURNS, max_size=12)


def intervals_of(rows: list[tuple[int, int, int, int | None]]) -> ResidencyIntervals:
    """Return intervals from (head, key, enter, leave), as they are stored."""
    stored = [(head, key, enter, -1 if leave is None else leave) for head, key, enter, leave in rows]
    head, key, enter, leave = np.array(stored, np.int64).reshape(-1, 4).T
    return ResidencyIntervals.of(kv_head=head, key=key, enter=enter, leave=leave, heads=HEADS, length=LENGTH)


@given(DRAWN, st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_every_question_has_the_answer_of_the_definition(drawn, random) -> None:
    rows = [
        (head, key, turns[at], turns[at + 1] if at + 1 < len(turns) else None)
        for (head, key), turns in drawn.items()
        for at in range(0, len(turns), 2)
    ]
    random.shuffle(rows)
    intervals, expected = intervals_of(rows), resident(rows, HEADS, LENGTH)
    held = np.array([[[key in keys for key in range(LENGTH)] for keys in steps] for steps in expected])
    assert (intervals.held(0, LENGTH) == held).all()
    assert (intervals.held(2, 5) == held[:, 2:5]).all()
    before = np.concatenate([np.zeros((HEADS, 1, LENGTH), bool), held[:, :-1]], axis=1)
    assert (intervals.visible(0, LENGTH) == (before | np.eye(LENGTH, dtype=bool))).all()
    for step in range(LENGTH):
        assert (intervals.held_after(step) == held[:, step].reshape(-1)).all()
    assert (intervals.holding_heads(np.arange(LENGTH)) == held.sum(0)).all()
    found = intervals.absences()
    absent = np.zeros_like(held)
    for head, key, start, until in zip(found.head, found.key, found.start, found.until, strict=True):
        absent[head, start:until, key] = True
    assert (absent == (~held & np.logical_or.accumulate(held, axis=1))).all()


@pytest.mark.parametrize("heads", [1, 3])
def test_eviction_steps_come_back(heads: int) -> None:
    steps = np.where(np.arange(heads * LENGTH) % 3 == 0, NEVER, LENGTH - 1).astype(np.int32).reshape(heads, LENGTH)
    intervals = ResidencyIntervals.from_eviction_steps(steps)
    assert intervals.one_per_key and (intervals.eviction_steps == steps.ravel()).all()
    assert (intervals.stored_leave == np.where(steps.ravel() == NEVER, -1, LENGTH - 1)).all()
    again = ResidencyIntervals.of(
        kv_head=intervals.kv_head,
        key=intervals.key,
        enter=intervals.enter,
        leave=intervals.stored_leave,
        heads=heads,
        length=LENGTH,
    )
    assert (again.leave == intervals.leave).all()

"""The share of long work that is done."""

import pytest

from kvscope.core.progress import part_of


def test_a_part_of_the_work_goes_evenly_from_its_start_to_its_end() -> None:
    shares: list[float] = []
    whole = part_of(shares.append, 1, 3, total=4)
    assert whole is not None
    for share in (0, 0.25, 0.5, 1):
        whole(share)
    assert shares == pytest.approx([0.25, 0.375, 0.5, 0.75])


def test_parts_of_parts() -> None:
    shares: list[float] = []
    inner = part_of(part_of(shares.append, 0.5, 1), 1, 2, total=2)
    assert inner is not None
    inner(0)
    inner(1)
    assert shares == pytest.approx([0.75, 1])


def test_without_a_listener_nothing_is_called() -> None:
    assert part_of(None, 0, 1) is None

"""Totals of rows are the same in any order of additions, also of rows in double."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.kernels.totals import row_totals
from tests.engine.maps import KINDS, attention


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), KINDS, st.integers(2, 400))
def test_the_order_of_additions_makes_no_difference(seed: int, kind: str, length: int) -> None:
    (row,) = attention(seed, 1, 1, length, kind)[0, :, -1]
    generator = torch.Generator().manual_seed(seed)
    totals = {row_totals(row[torch.randperm(length, generator=generator)]).item() for _ in range(20)}
    assert totals == {math.fsum(row.tolist())}


def test_plain_sums_differ() -> None:
    (row,) = attention(1, 1, 1, 400)[0, :, -1]
    orders = [torch.randperm(400, generator=torch.Generator().manual_seed(seed)) for seed in range(50)]
    assert len({row[order].sum().item() for order in orders}) > 1


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_rows_in_32_bit_are_added_in_double(size: int) -> None:
    row = torch.rand(size, generator=torch.Generator().manual_seed(size))
    assert row_totals(row).item() == pytest.approx(math.fsum(row.tolist()), rel=1e-15)

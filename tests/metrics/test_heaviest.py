"""The heaviest keys of a row, chosen one by one."""

import numpy as np
import pytest
import torch

from kvscope.metrics.heaviest import heaviest, heaviest_by_rank, ranks


def reference(row: list[float], t: int, budget: int, skip: int) -> set[int]:
    """Return the keys: heaviest first, of equal ones the newer."""
    others = sorted(range(skip, t), key=lambda key: (row[key], key), reverse=True)
    return set(others[:budget])


@pytest.mark.parametrize("levels", [2, 5, 1000])  # few levels: many equal weights
@pytest.mark.parametrize("skip", [0, 4])
def test_heaviest(levels: int, skip: int) -> None:
    random = np.random.default_rng(levels + skip)
    steps = torch.arange(3, 20)
    full = torch.from_numpy(random.integers(0, levels, (2, 3, 17, 20)) / levels)
    full = full.tril(3)
    budgets = [1, 4, 7, 7, 19, 40]
    found = heaviest(full, steps, budgets, skip)
    for index in np.ndindex(2, 3, 17):
        row, t = full[index].tolist(), int(steps[index[2]])
        for run, budget in enumerate(budgets):
            assert set(found[run][index].nonzero().flatten().tolist()) == reference(row, t, budget, skip)


def test_runs_with_rows_of_their_own() -> None:
    random = torch.Generator().manual_seed(0)
    steps, full = torch.arange(5, 9), torch.rand(2, 1, 2, 4, 9, generator=random).tril(5)
    found = heaviest(full, steps, [2, 3])
    for run, budget in enumerate([2, 3]):
        assert torch.equal(found[run], heaviest(full[run], steps, [budget])[0])


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])  # few levels: many equal weights
@pytest.mark.parametrize("skip", [0, 4])
@pytest.mark.parametrize("first", [0, 3])
def test_one_ranking_serves_every_budget(levels: int, skip: int, first: int) -> None:
    random = np.random.default_rng(levels + skip)
    steps = torch.arange(first, 20)
    full = torch.from_numpy(random.integers(0, levels, (2, 3, len(steps), 20)) / levels).float().tril(first)
    rank = ranks(full, steps).to(torch.int32)
    for budgets in ([1, 4, 7, 7, 19, 40], [20], [3, 2]):
        found = heaviest_by_rank(rank, steps, torch.tensor(budgets), skip)
        assert torch.equal(found, heaviest(full, steps, budgets, skip))
        for index in np.ndindex(2, 3, len(steps)):
            for run, budget in enumerate(budgets):
                chosen = set(found[run][index].nonzero().flatten().tolist())
                assert chosen == reference(full[index].tolist(), int(steps[index[2]]), budget, skip)


def test_one_ranking_of_runs_with_rows_of_their_own() -> None:
    random = torch.Generator().manual_seed(0)
    steps, full = torch.arange(5, 9), torch.randint(0, 3, (2, 1, 2, 4, 9), generator=random).float().tril(5)
    found = heaviest_by_rank(ranks(full, steps), steps, torch.tensor([2, 3]), 1)
    assert torch.equal(found, heaviest(full, steps, [2, 3], 1))

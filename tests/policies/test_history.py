"""The window of last rows against a list of them."""

import pytest
import torch
from torch import Tensor

from kvscope.policies.history import History


def row(kind: str, n: int, generator: torch.Generator) -> Tensor:
    """Return ``[2, 3, n]`` with many zeros."""
    drawn = torch.rand(2, 3, n, dtype=torch.float64, generator=generator) - 0.5
    if kind == "float":
        return drawn.clamp(min=0)
    return drawn > 0 if kind == "bool" else (drawn * 8).int()


@pytest.mark.parametrize("kind", ["float", "bool", "int"])
@pytest.mark.parametrize("window", [1, 2, 3, 8, 30])
@pytest.mark.parametrize("asked_from", [0, 1, 5, 17])
def test_rows_and_sums_equal_those_of_a_list(kind: str, window: int, asked_from: int) -> None:
    generator = torch.Generator().manual_seed(window)
    history, rows, n = History(window), [], 1
    for t in range(40):
        rows.append(row(kind, n, generator))
        history.push(rows[-1])
        assert history.count == min(window, t + 1)
        if t >= asked_from and t % 3:  # sums that nobody asked for are not kept, and must be right from any step on
            last = [torch.nn.functional.pad(one, (0, n - one.shape[-1])) for one in rows[-window:]]
            kept = torch.stack(last, -2)
            assert torch.equal(history.rows, kept)
            exact = kept.double().sum(-2)
            torch.testing.assert_close(history.sum.double(), exact)
            assert torch.equal(history.sum == 0, exact == 0)
            torch.testing.assert_close(history.squares.double(), (kept.double() ** 2).sum(-2))
        n += [0, 1, 1, 4][t % 4]


def test_a_key_that_lost_its_rows_sums_to_exactly_zero() -> None:
    """Subtracting what leaves would leave rounding behind, and ties would be decided by it."""
    history = History(3)
    for weight in [0.1, 0.7, 0.3, 0.9, 0.2, 0.0, 0.0, 0.0]:
        history.push(torch.tensor([weight, 1.0]))
        assert history.sum is not None
    assert history.sum.tolist() == [0.0, 3.0]


def test_space_is_taken_as_rows_come() -> None:
    history = History(400)
    for _ in range(5):
        history.push(torch.ones(1, 10))
    assert history._buffer.shape[-2] <= 8
    for _ in range(600):
        history.push(torch.ones(1, 10))
    assert history._buffer.shape[-2] == 400 and history.sum.tolist() == [[400.0] * 10]


def test_a_sum_that_was_given_out_does_not_change() -> None:
    history = History(4)
    history.push(torch.ones(3))
    before = history.sum
    history.push(torch.ones(3))
    assert before.tolist() == [1.0, 1.0, 1.0]


def test_each_sequence_has_its_own() -> None:
    memory: dict[str, object] = {}
    History.of(memory, "a", 2).push(torch.ones(1))
    assert History.of(memory, "a", 2).count == 1
    assert History.of({}, "a", 2).count == 0
    with pytest.raises(AssertionError, match="another history"):
        History.of(memory, "a", 3)

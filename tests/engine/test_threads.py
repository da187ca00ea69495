"""Small steps use one thread, and the number of threads is restored afterwards."""

import pytest
import torch

from kvscope.engine.threads import SMALL, few_threads


@pytest.fixture
def _two() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield None
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two")
def test_only_small_steps() -> None:
    with few_threads(SMALL - 1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with few_threads(SMALL):
        assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("_two")
def test_the_number_of_threads_is_restored_after_an_error() -> None:
    with pytest.raises(ValueError, match="a step"), few_threads(1):
        raise ValueError("a step failed")
    assert torch.get_num_threads() == 2

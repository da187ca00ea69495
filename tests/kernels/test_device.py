"""Which device is taken: `auto` never fails, and a device that cannot be used is refused in two lines."""

import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.kernels.device import torch_device


@pytest.mark.parametrize(
    ("cuda", "mps", "double", "taken"),
    [
        (True, True, True, "cuda"),
        (True, False, False, "cuda"),
        (False, True, False, "mps"),
        (False, True, True, "cpu"),
        (False, False, False, "cpu"),
        (False, False, True, "cpu"),
    ],
)
def test_auto_takes_the_first_that_can_be_used(
    cuda: bool, mps: bool, double: bool, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert torch_device("auto", double=double).type == taken


@pytest.mark.parametrize("name", ["nowhere", "", "cuda:99" if torch.cuda.is_available() else "cuda", "mps"])
def test_what_cannot_be_used_is_refused(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        torch_device(name)
    assert repr(name) in caught.value.what and "\n" not in caught.value.what
    assert caught.value.todo == "Use --device cpu."


def test_a_device_that_is_named_is_taken() -> None:
    assert torch_device("cpu") == torch.device("cpu")

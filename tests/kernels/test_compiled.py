"""Loops are compiled even if no cache folder can be written to."""

from __future__ import annotations

from typing import Any

import pytest

import kvscope.kernels.compiled as module


def test_without_a_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    njit, asked = module.njit, []

    def refusing(**options: Any) -> Any:
        asked.append(options)
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return njit(**options)

    def twice(number: int) -> int:
        return 2 * number

    monkeypatch.setattr(module, "njit", refusing)
    made = module.compiled(twice)
    assert made(21) == 42 and made is not twice
    assert len(asked) == 2

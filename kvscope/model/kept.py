"""Keep the model that was loaded last, for commands that use one many times."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from kvscope.core.options import ModelSource
from kvscope.kernels.device import torch_device

T = TypeVar("T")


@dataclass
class _Slot:
    """The model that was loaded last, and what it was loaded from; both None at first."""

    source: ModelSource | None = None
    loaded: object = None


_SLOTS: list[_Slot] = []  # empty outside of `keep_loaded`


@contextmanager
def keep_loaded() -> Iterator[None]:
    """Keep the model that was loaded last in memory while the block runs; blocks inside it share the model."""
    outermost = not _SLOTS
    if outermost:
        _SLOTS.append(_Slot())
    try:
        yield
    finally:
        if outermost:
            _SLOTS.clear()


def kept(source: ModelSource, load: Callable[[], T]) -> T:
    """Return what `load` returns; inside `keep_loaded`, what it returned last if that was for the same source."""
    if not _SLOTS:
        return load()
    (slot,) = _SLOTS
    source = replace(source, device=str(torch_device(source.device, double=False)))
    if source != slot.source:
        slot.source = slot.loaded = None  # its memory is free before the next one is loaded
        slot.loaded = load()
        slot.source = source
    return cast(T, slot.loaded)

"""Loops compiled for a CPU where numba is installed, and for a GPU where Triton is; each has a fallback in torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from typing import TypeVar

import torch

from kvscope.core.memory import require_addresses

T = TypeVar("T")
NUMBA_BYTES = 400 * 2**20  # addresses that loading it takes, with room to compile
OFF = "KVSCOPE_NO_KERNELS"  # environment variable: if it is not empty, the fallbacks are used


@cache
def available() -> bool:
    """Return whether kernels can be compiled: numba is installed and not switched off."""
    if os.environ.get(OFF):
        return False
    require_addresses(NUMBA_BYTES, "numba")
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


@cache
def triton_available() -> bool:
    """Return whether Triton is installed, as it is with torch's builds for CUDA."""
    return not os.environ.get(OFF) and find_spec("triton") is not None


def spread(work: Callable[[int, int], None], units: int) -> None:
    """Divide `units` evenly and call ``work(first, last)`` for each part, on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), units)
    if threads <= 1:
        work(0, units)
        return
    edges = [units * part // threads for part in range(threads + 1)]
    list(_pool(threads).map(work, edges[:-1], edges[1:]))


def shared(work: Callable[[int], T], items: Sequence[int]) -> Iterable[T]:
    """Return ``work(item)`` for each item, in order, computed on as many threads as torch uses."""
    threads = min(torch.get_num_threads(), len(items))
    return map(work, items) if threads <= 1 else _pool(threads).map(work, items)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="kvscope-kernel")

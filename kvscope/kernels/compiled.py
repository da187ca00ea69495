"""Compilation of loops with numba. Imported only if numba is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., object])


def compiled(function: F) -> F:
    """Return the function compiled for the types of its arguments, cached on disk; it releases the GIL.

    Division by zero gives inf or NaN, as in numpy, so that no check is needed.
    """
    return _compile(function, fastmath=False)


def summing(function: F) -> F:
    """Return the function compiled as by `compiled`, with sums in any order, so that they can be vectorised."""
    return _compile(function, fastmath={"reassoc", "nsz", "contract"})


def _compile(function: F, fastmath: bool | set[str]) -> F:
    def compile_with(*, cache: bool) -> F:
        return cast(F, njit(cache=cache, nogil=True, error_model="numpy", fastmath=fastmath)(function))

    try:
        return compile_with(cache=True)
    except RuntimeError:  # no cache folder can be written to: compile in every process
        return compile_with(cache=False)

"""How loops are compiled. Imported only where numba is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Return a function compiled for whatever it is called with, and kept on disk; other threads run beside it.

    Divisions do not ask for zero each time.
    """
    return _made(function)


def summing(function: F) -> F:
    """Do the same for one whose sums may be made in any order, and so several at a time."""
    return _made(function, fastmath={"reassoc", "nsz", "contract"})


def _made(function: F, **options: Any) -> F:
    options |= {"nogil": True, "error_model": "numpy"}
    try:
        return cast(F, njit(cache=True, **options)(function))
    except RuntimeError:  # neither the package nor the user's own cache can be written to: compile in every process
        return cast(F, njit(**options)(function))

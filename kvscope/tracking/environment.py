"""Environment variables for the time of an export."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def defaults(variables: Mapping[str, str]) -> Iterator[None]:
    """Set those variables that the user has not set, and unset them afterwards."""
    unset = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in unset})
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)

"""Numbers of things in words."""

from __future__ import annotations


def count(number: int, one: str, several: str | None = None) -> str:
    """Return a number with the noun in its form: ``1 run``, ``2 runs``."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"

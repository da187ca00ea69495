"""Who is held when, stay by stay and step by step."""

from __future__ import annotations

from collections.abc import Sequence

Stay = tuple[int, int, int, int | None]  # key/value head, key, enter, leave


def resident(stays: Sequence[Stay], heads: int, length: int) -> list[list[set[int]]]:
    """Return ``R_t`` of every head: key ``k`` is in it when ``enter <= t`` and (no ``leave`` or ``leave > t``)."""
    return [
        [
            {key for of, key, enter, leave in stays if of == head and enter <= t and (leave is None or leave > t)}
            for t in range(length)
        ]
        for head in range(heads)
    ]

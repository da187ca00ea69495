"""Delayed eviction: the keys that are held and seen where a key is rejected on arrival and leaves later."""

from __future__ import annotations

from tests.reference.policies.evict import Sets


def delayed(rejected: list[bool], prompt: int, prefill: str, window: int) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t``; a rejected key leaves when `window` newer keys exist, not before eviction starts."""
    all_visible, all_held = [], []
    held: set[int] = set()
    first = 0 if prefill == "stream" else prompt - 1
    for t in range(len(rejected)):
        visible = held | {t}
        held = {key for key in visible if not (t >= first and rejected[key] and t - key >= window)}
        all_visible.append(visible)
        all_held.append(held)
    return all_visible, all_held

"""Attention-Gate: flags for keys, and the mask of the paper for queries within a prompt."""

from __future__ import annotations

from tests.reference.policies.evict import Sets


def flags(shut: list[bool], prompt: int, prefill: str, decode: bool) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t`` for gates that are shut or not; every query sees its own key."""
    all_visible, all_held = [], []
    for t in range(len(shut)):
        gone = {key for key in range(t + 1) if shut[key] and (key < prompt or decode)}
        before = set() if prefill == "full" and t < prompt else gone - {t}
        after = set() if prefill == "full" and t < prompt - 1 else gone
        all_visible.append(set(range(t + 1)) - before)
        all_held.append(set(range(t + 1)) - after)
    return all_visible, all_held

"""StreamingLLM: the published cache, a list of which the middle is cut out after each forward pass."""

from __future__ import annotations

from tests.reference.policies.evict import Sets


def cache(length: int, start_size: int, recent_size: int, prompt: int, prefill: str) -> tuple[Sets, Sets]:
    """Return ``V_t`` and ``R_t``: the prompt in one forward pass, or with streaming prefill token by token."""
    kept: list[int] = []
    all_visible, all_held = [], []
    for t in range(length):
        kept = [*kept, t]
        all_visible.append(set(kept))
        if (prefill == "stream" or t >= prompt - 1) and len(kept) > start_size + recent_size:
            kept = kept[:start_size] + kept[len(kept) - recent_size :]
        all_held.append(set(kept))
    return all_visible, all_held

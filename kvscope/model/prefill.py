"""How much of a prompt goes through the model at a time."""

from __future__ import annotations

from kvscope.core.errors import UsageError
from kvscope.model.loading import Loaded
from kvscope.model.selfcheck import AttentionFacts

CHUNK_BYTES = 512 * 2**20  # of what a chunk makes at once: logits, and rows where the kernel builds them
LEAST, MOST = 64, 2048  # tokens of a chunk that is not asked for
ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})


def chunk_size(loaded: Loaded, facts: AttentionFacts, longest: int, asked: int | None) -> int | None:
    """Return the tokens that go through the model at a time, or None where every prompt goes at once.

    Parameters
    ----------
    longest : int
        Tokens of the longest prompt, with its continuation where that is forced.
    asked : int or None
        What the user wants. Without it, as many as make about `CHUNK_BYTES`.

    Raises
    ------
    UsageError
        If chunks are asked for and would change what this model computes.
    """
    size = _sensible(loaded, facts, longest) if asked is None else asked
    if size >= longest:
        return None
    why_whole = _why_whole(loaded, facts)
    if why_whole and asked is not None:
        raise UsageError(f"{loaded.name} cannot read a prompt in chunks: {why_whole}", "Leave --prefill-chunk out.")
    return None if why_whole else size


def _sensible(loaded: Loaded, facts: AttentionFacts, longest: int) -> int:
    logits = loaded.text_config.vocab_size * loaded.model.dtype.itemsize
    # Eager code holds the logits of attention and, in float32, the rows; other kernels hold neither.
    rows = 8 * facts.heads * longest if loaded.model.config._attn_implementation == "eager" else 0
    return min(MOST, max(LEAST, CHUNK_BYTES // int(logits + rows)))


def _why_whole(loaded: Loaded, facts: AttentionFacts) -> str:
    """Return why the parts of a prompt, one after the other, would give other numbers than all of it; or nothing."""
    if len(facts.windows) < loaded.text_config.num_hidden_layers:
        return "some of its layers are no attention, and carry no state from one chunk to the next"
    parameters = getattr(loaded.text_config, "rope_parameters", None) or {}
    by_layer_type = [part for part in parameters.values() if isinstance(part, dict)]
    if ROPE_BY_LENGTH & {part.get("rope_type") for part in by_layer_type or [parameters]}:
        return "its rotary embedding depends on the length of what it reads at once"
    return ""

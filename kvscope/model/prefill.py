"""How many tokens of a prompt the model reads in one forward pass."""

from __future__ import annotations

from kvscope.core.errors import UsageError
from kvscope.model.loading import Loaded
from kvscope.model.selfcheck import AttentionFacts

CHUNK_BYTES = 512 * 2**20  # memory for the logits of a chunk, and for its rows where the kernel computes them
LEAST, MOST = 64, 2048  # bounds of the default chunk, in tokens
ROPE_BY_LENGTH = frozenset({"dynamic", "longrope"})


def chunk_size(
    loaded: Loaded, facts: AttentionFacts, longest: int, requested: int | None, *, images: bool = False
) -> int | None:
    """Return the tokens per forward pass, or None if every prompt is read in one pass.

    Parameters
    ----------
    longest : int
        Tokens of the longest prompt, including a forced continuation.
    requested : int or None
        Chunk size that the user chose; None for a size whose logits take about `CHUNK_BYTES`.
    images : bool
        Whether a prompt has images, which the model reads in one pass.

    Raises
    ------
    UsageError
        If chunks are requested and would change what this model computes.
    """
    size = _default_size(loaded, facts, longest) if requested is None else requested
    if size >= longest:
        return None
    obstacle = "its images are read in one pass" if images else _obstacle(loaded, facts)
    if obstacle and requested is not None:
        raise UsageError(f"{loaded.name} cannot read a prompt in chunks: {obstacle}", "Omit --prefill-chunk.")
    return None if obstacle else size


def _default_size(loaded: Loaded, facts: AttentionFacts, longest: int) -> int:
    logits = loaded.text_config.vocab_size * loaded.model.dtype.itemsize
    # Eager code holds attention logits and, in float32, the rows in memory; other kernels hold neither.
    rows = 8 * facts.heads * longest if loaded.model.config._attn_implementation == "eager" else 0
    return min(MOST, max(LEAST, CHUNK_BYTES // int(logits + rows)))


def _obstacle(loaded: Loaded, facts: AttentionFacts) -> str:
    """Return why reading a prompt in chunks would change the numbers; empty if it would not."""
    if facts.others:
        return "some of its layers have no attention, and their state would be lost between chunks"
    parameters = getattr(loaded.text_config, "rope_parameters", None) or {}
    by_layer_type = [part for part in parameters.values() if isinstance(part, dict)]
    if ROPE_BY_LENGTH & {part.get("rope_type") for part in by_layer_type or [parameters]}:
        return "its rotary embedding depends on the number of tokens in a forward pass"
    return ""

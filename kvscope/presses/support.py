"""Which presses of kvpress 0.5 can be followed, by name, and why others cannot. kvpress is not needed to know it."""

from __future__ import annotations

from typing import NamedTuple

from kvscope.core.errors import UsageError
from kvscope.policies.press import PREFIX, PressCall


class Support(NamedTuple):
    """How a press is followed.

    Attributes
    ----------
    kind : str
        ``scorer``, ``wrapper`` or ``own size``.
    budget : str
        What the budget of a run means for it.
    example : str
        A press that can be built, as on the command line.
    """

    kind: str
    budget: str
    example: str


KEYS = "keys of each key/value head"
MEAN = "mean keys of a layer's heads, which it divides among them"
CHUNKS = "its share of the chunks, rounded down, and at least one chunk"
SNAP = "SnapKVPress(window_size=8)"

SUPPORTED: dict[str, Support] = {
    "CURPress": Support("scorer", KEYS, "CURPress()"),
    "CapPress": Support("scorer", KEYS, "CapPress()"),
    "CompactorPress": Support("scorer", KEYS, "CompactorPress(chunk_size=32)"),
    "CriticalKVPress": Support("scorer", KEYS, f"CriticalKVPress(press={SNAP})"),
    "ExpectedAttentionPress": Support("scorer", KEYS, "ExpectedAttentionPress(n_future_positions=64)"),
    "KeyDiffPress": Support("scorer", KEYS, "KeyDiffPress()"),
    "KnormPress": Support("scorer", KEYS, "KnormPress()"),
    "LagKVPress": Support("scorer", KEYS, "LagKVPress(lag_size=16)"),
    "LeverageScorePress": Support("scorer", KEYS, "LeverageScorePress()"),
    "NonCausalAttnPress": Support("scorer", KEYS, "NonCausalAttnPress(chunk_size=32)"),
    "ObservedAttentionPress": Support("scorer", KEYS, "ObservedAttentionPress()"),
    "PyramidKVPress": Support(
        "scorer", "mean keys of the layers, which it divides among them", "PyramidKVPress(window_size=4, beta=4)"
    ),
    "RandomPress": Support("scorer", KEYS, "RandomPress(seed=3)"),
    "SnapKVPress": Support("scorer", KEYS, SNAP),
    "StreamingLLMPress": Support("scorer", KEYS, "StreamingLLMPress(n_sink=4)"),
    "TOVAPress": Support("scorer", KEYS, "TOVAPress()"),
    "AdaKVPress": Support("wrapper", MEAN, f"AdaKVPress(press={SNAP})"),
    "BlockPress": Support("wrapper", KEYS, "BlockPress(press=KeyDiffPress(), block_size=16)"),
    "ChunkKVPress": Support("wrapper", CHUNKS, f"ChunkKVPress(press={SNAP}, chunk_length=6)"),
    "ChunkPress": Support(
        "wrapper", "the share of each chunk, rounded down", "ChunkPress(press=KeyDiffPress(), chunk_length=16)"
    ),
    "CriticalAdaKVPress": Support("wrapper", MEAN, f"CriticalAdaKVPress(press={SNAP})"),
    "EntropyGatedChunkKVPress": Support("wrapper", KEYS, f"EntropyGatedChunkKVPress(press={SNAP})"),
    "ComposedPress": Support(
        "own size",
        "none: each press has its ratio",
        "ComposedPress(presses=[KnormPress(compression_ratio=0.2), KeyDiffPress(compression_ratio=0.2)])",
    ),
    "DMSPress": Support(
        "own size", "none: a threshold of scores", "DMSPress(press=KnormPress(), threshold=-4.0, sliding_window_size=8)"
    ),
    "PerLayerCompressionPress": Support(
        "own size",
        "none: a ratio for each layer",
        "PerLayerCompressionPress(press=KnormPress(), compression_ratios=[0.2, 0.4, 0.6, 0.8])",
    ),
    "SimLayerKVPress": Support(
        "own size",
        "none: lazy layers retain their first and newest keys",
        "SimLayerKVPress(lazy_threshold=0.3, n_recent=16)",
    ),
}
_DECODES = "evicts while tokens are generated, but kvscope reads the retained keys at the end of the prompt"
_LOADS = "loads weights or data that were made for one model from the network"
_READS_AGAIN = "runs the model over the prompt again to score it"
_INSIDE = "Use the press inside it"
_OTHER = "Use another press; docs/kvpress.md lists those that can be followed"
# name -> why it cannot be followed, and what to do instead
REFUSED: dict[str, tuple[str, str]] = {
    "CAMPress": ("adds the values of evicted keys to others while tokens are generated", _OTHER),
    "CompressionRatioDecodingPress": (_DECODES, f"{_INSIDE} for the prompt"),
    "DecodingPress": (_DECODES, f"{_INSIDE} for the prompt"),
    "DuoAttentionPress": (_LOADS, _OTHER),
    "ExpectedAttentionStatsPress": (_LOADS, "Use ExpectedAttentionPress, which takes its statistics from the prompt"),
    "FastKVzipPress": (_LOADS, _OTHER),
    "FinchPress": ("adds a token to the tokenizer and the model to mark where a question begins", "Use SnapKVPress"),
    "KVComposePress": (
        "gets the tokens of a context from its own pipeline, and evicts after the pass over them",
        _OTHER,
    ),
    "KVgradPress": (_READS_AGAIN, _OTHER),
    "KVzapPress": (_LOADS, _OTHER),
    "KVzipPress": (_READS_AGAIN, _OTHER),
    "KeyRerotationPress": (
        "rotates the retained keys to other positions; the press inside it selects them",
        _INSIDE,
    ),
    "LUKVPress": (_LOADS, _OTHER),
    "MergingPress": ("adds the values of evicted keys to those of others", f"{_INSIDE}, which evicts the same keys"),
    "PrefillDecodingPress": (_DECODES, "Use its prefilling_press"),
    "QFilterPress": (_LOADS, _OTHER),
    "RestoreKVPress": (_LOADS, _OTHER),
    "ThinKPress": ("removes channels of keys and retains every key", _OTHER),
}


def require_supported(call: PressCall) -> None:
    """Raise UsageError if a press, or one in its arguments, is among those that cannot be followed."""
    for each in call.nested():
        if each.name in REFUSED:
            why, todo = REFUSED[each.name]
            raise UsageError(f"{PREFIX}{each.name} cannot be followed: it {why}", f"{todo}.")


def describe_presses() -> list[dict[str, str]]:
    """Return every press that can be followed: its name, kind, what a budget means for it, and an example."""
    return [{"press": name, **support._asdict()} for name, support in SUPPORTED.items()]

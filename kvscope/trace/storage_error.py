"""How far rows that are rebuilt from a trace can be from the recorded ones, and bounds on the error of metrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvscope.trace.record import SequenceRecord, StorageError, TraceHeader

Floats = NDArray[np.floating]
REST = "r / (m + r)"
NONE = "none"
# Metric -> bound on its error at each step with store topk, for the same decisions.
BOUNDS = {
    "retained_mass": "r",
    "retained_mass_no_sinks": REST,
    "ideal_mass": "r",
    "ideal_mass_no_sinks": REST,
    "full_cosine": "r w / (s + r w), of its square",
    "ideal_cosine": "B < K: both lie from q / sqrt((v + r w)(i + r w)) to (q + r w) / sqrt(v i); otherwise none",
    "ideal_cosine_flattened": NONE,
    "mask_cosine": "B < K: 0, but for ties; otherwise none",
    "ideal_recall": "B < K: 0, but for ties; otherwise none",
    "recovered_mass": "B < K: r; otherwise none",
    "recovered_mass_no_sinks": f"B < K: {REST}; otherwise none",
    "late_mass_retained": NONE,
    "output_error": "not computed: values are not stored",
    "read_keys": "0",
    "held_keys": "0",
}


class Outside:
    """Collects the share of each row's mass that store ``topk`` does not store."""

    def __init__(self) -> None:
        # (layer, sequence) -> for consecutive blocks of positions, the mean and the largest share over the heads
        self._blocks: dict[tuple[int, int], list[tuple[Floats, Floats]]] = defaultdict(list)

    def add(self, layer: int, sequence: int, share: Floats) -> None:
        """Add the shares ``[H, q]`` of the next rows."""
        self._blocks[layer, sequence].append((share.mean(0), share.max(0)))

    def summed_up(self, sequences: Sequence[SequenceRecord]) -> StorageError:
        """Return mean and maximum of the shares over all rows; `sequences` gives the lengths of each sequence."""
        shares: list[Floats] = []
        later: list[Floats] = []
        worst = 0.0
        for (_, sequence), blocks in sorted(self._blocks.items()):
            mean, largest = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
            shares.append(mean)
            later.append(mean[sequences[sequence].prompt :])
            worst = max(worst, float(largest.max()))
        after = np.concatenate(later)
        return StorageError(
            mean=float(np.concatenate(shares).mean()),
            mean_after_prompt=float(after.mean()) if after.size else None,
            worst=worst,
        )


def approximate(header: TraceHeader, error: StorageError | None) -> list[str]:
    """Return sentences about what a trace lacks: exact rows, heads, rows, what a sink takes; empty for a full one.

    Parameters
    ----------
    header : TraceHeader
        Header of the trace.
    error : StorageError or None
        From `Outside.summed_up`; None if whole rows are stored.
    """
    sentences = []
    if error is not None:
        after = error.mean if error.mean_after_prompt is None else error.mean_after_prompt
        sentences.append(
            f"Lossy: the trace keeps the {header.top} heaviest keys of a row; {after:.1%} of a row's attention after "
            f"the prompt is on others (mean; {error.worst:.1%} at worst). Retained mass is known to within that; "
            "which of these others a policy keeps is an estimate from exact sums of columns. Policies that read no "
            "weights decide as on a whole trace."
        )
    if header.head_numbers:
        numbers = ", ".join(map(str, header.head_numbers))
        sentences.append(
            f"Sampled: of the model's {header.n_heads} query heads {numbers} were recorded, numbered here from 0."
        )
    if header.query_stride > 1:
        sentences.append(f"Sampled: every {header.query_stride}th row of attention was recorded.")
    if header.sink_rows == "before":
        sentences.append(
            "Rows before the sink: the model's learned sinks take a share of every row that the trace does not know. "
            "Retained mass and all that compares shares of a row is the same without it; the output error, the "
            "flattened cosine and the sums of policies are those of a model without sinks."
        )
    if header.indexed:
        sentences.append(
            "Learned index: a query of this model sees the keys that the model itself chooses, and rows have weight on "
            "these alone. The policy indexer reads them; what other policies retain is a share of that."
        )
    if header.shared_cache:
        reading, owners = ", ".join(header.shared_cache), sorted(set(header.shared_cache.values()))
        sentences.append(
            f"Shared caches: layers {reading} read the cache of layers {', '.join(map(str, owners))}. One decision "
            "holds for all that read a cache, made from the rows of the layer that owns it, and budgets count it once."
        )
    if header.latent_size is not None:
        sentences.append(
            f"Latent cache: the heads of a layer share one vector of {header.latent_size} numbers per token, which is "
            "held as long as any head holds its key. So the heads of a layer decide as one by default; a policy that "
            "cannot decides per head, and saves less than its budget says."
        )
    return sentences


def describe_bounds() -> list[str]:
    """Return lines of Markdown: how rows of store ``topk`` are rebuilt, and how far metrics can be off."""
    return [
        "## Store `topk`: storage error",
        "",
        "The reader gives whole rows: the stored weights, and on the other keys the residual, in proportion to what",
        "each got per unit of residual in the stretch of rows that `columns` sums up, but nowhere as much as the",
        "smallest stored weight. So retained mass lies, as that of the true row, between the stored mass that is kept",
        "and that plus the residual. For the same decisions a metric of one step is off by at most this, beside the",
        "rounding to 16 bit:",
        "",
        "| metric | bound |",
        "|---|---|",
        *(f"| `{name}` | {bound} |" for name, bound in BOUNDS.items()),
        "",
        "`r` is the residual's share of the row; `m` what is stored beyond the first 4 positions; `w` the smallest",
        "stored weight; `s`, `v`, `i`, `q` are sums of squares of stored weights: all, visible, ideal, both. `B` is",
        "the budget, `K` the weights stored. Weights are shares of their row.",
        "",
        "Decisions: policies that read no weights decide the same. Others see exact weights on stored keys and an",
        "estimate on the others, so that among keys of little weight they may choose otherwise; sums over rows stay",
        "near the exact ones. `trace.json` says in `loss` how much is outside.",
        "",
    ]

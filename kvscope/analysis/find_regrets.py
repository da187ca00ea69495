"""The regret of the runs of a replay, from their residency intervals and the trace: every row is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from kvscope.analysis.missed_attention import MissedAttentionCounter
from kvscope.analysis.regret import Regret, RegretCollector, TokenKinds
from kvscope.results.residency import read_residency
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace

BLOCK_BYTES = 64 * 2**20  # of the rows of a layer that are in memory at once


class RunRegret(Regret):
    """Regret of one run, and which run it is."""

    run: int
    policy: str
    label: str
    budget: str | None
    prefill: str
    loop: str


class RegretReport(TypedDict):
    """Regret of the runs of a replay, as ``kvscope regret --json`` prints it."""

    kind: str
    schema: int
    replay: str
    trace: str
    runs: list[RunRegret]


def regrets(
    replay: Replay,
    trace: Trace,
    runs: Sequence[int] | None = None,
    *,
    top: int = 20,
    progress: Callable[[float], None] | None = None,
) -> RegretReport:
    """Return the regret of runs of a replay: the attention that their evicted keys would still have received.

    Parameters
    ----------
    replay : Replay
        Which keys were held when. For a closed run: its residency, and the attention of the full cache.
    trace : Trace
        That it was made from.
    runs : sequence of int, optional
        Their numbers; all by default.
    top : int
        How many evictions and tokens to list for each run.
    progress : callable, optional
        Called with the share that is done.

    Raises
    ------
    ResultError
        If the trace is another than that of the replay.
    """
    replay.require_trace(trace.identity, trace.path)
    chosen = [run for run in replay.info.runs if runs is None or run.run in runs]
    collected = {run.run: RegretCollector(top) for run in chosen}
    parts = [(sequence, layer) for sequence in trace.sequences for layer in trace.layers]
    for number, (sequence, layer) in enumerate(parts):
        residency = read_residency(replay, sequence.index, layer, list(collected))
        missing = {run: MissedAttentionCounter(intervals) for run, intervals in residency.items()}
        for start, rows in blocks(trace, sequence.index, layer):
            for of_run in missing.values():
                of_run.add(start, rows)
        for run, found in missing.items():
            collected[run].add(sequence.index, layer, found.result())
        if progress is not None:
            progress((number + 1) / len(parts))
    first = [of.prompt if replay.info.prefill == "full" else 0 for of in trace.sequences]
    steps = sum(of.length - start for of, start in zip(trace.sequences, first, strict=True))
    tokens = {of.index: TokenKinds(trace.tokens(of.index)["text"].tolist()) for of in trace.sequences}
    rows_of_run = len(trace.layers) * trace.kv_heads * steps
    return {
        "kind": "kvscope-regret",
        "schema": 1,
        "replay": str(replay.path),
        "trace": replay.info.trace.name,
        "runs": [
            {
                "run": run.run,
                "policy": run.policy,
                "label": run.label,
                "budget": run.budget,
                "prefill": run.prefill,
                "loop": run.loop,
                **collected[run.run].result(tokens, rows_of_run),
            }
            for run in chosen
        ],
    }


def blocks(trace: Trace, sequence: int, layer: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the first step and the rows of the key/value heads, the mean over their query heads, ``[G, b, n]``."""
    length = trace.sequences[sequence].length
    size = max(1, BLOCK_BYTES // (4 * trace.heads * length))
    for start in range(0, length, size):
        rows = trace.attention(sequence, layer, start, min(start + size, length))  # [H, b, n]
        yield start, rows.reshape(trace.kv_heads, -1, *rows.shape[1:]).mean(axis=1)

"""The regret of the runs of a replay, from residency intervals and trace; every row is read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from kvscope.analysis.missed_attention import MissedAttentionCounter
from kvscope.analysis.regret import Regret, RegretCollector
from kvscope.analysis.token_kinds import TokenKinds
from kvscope.core.records import RunRecord
from kvscope.results.residency import read_residency
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace

BLOCK_BYTES = 64 * 2**20  # size of the rows of a layer in memory at once


class RunRegret(Regret):
    """Regret of one run, with the description of the run."""

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

    It is the sum of the full-cache weights of later queries on evicted keys, averaged over the query heads of a group.

    Parameters
    ----------
    replay, trace : Replay, Trace
        The replay and its trace. For closed runs too, the attention is that of the full cache.
    runs : sequence of int, optional
        Numbers of the runs; by default all.
    top : int
        Number of evictions and of tokens to list for each run.
    progress : callable, optional
        Called with the completed share, from 0 to 1.

    Returns
    -------
    RegretReport
        A dict: ``runs`` has for each run the total ``mass``, the ``worst`` evictions and more.

    Raises
    ------
    ResultError
        If the trace is not that of the replay.
    """
    replay.require_trace(trace.identity, trace.path)
    chosen = [run for run in replay.info.runs if runs is None or run.run in runs]
    collected = {run.run: RegretCollector(top) for run in chosen}
    parts = [(sequence, layer) for sequence in trace.sequences for layer in trace.layers]
    for number, (sequence, layer) in enumerate(parts):
        residency = read_residency(replay, sequence.index, layer, list(collected))
        missed = {run: MissedAttentionCounter(intervals) for run, intervals in residency.items()}
        for start, rows in blocks(trace, sequence.index, layer):
            for counter in missed.values():
                counter.add(start, rows)
        for run, counter in missed.items():
            collected[run].add(sequence.index, layer, counter.result())
        if progress is not None:
            progress((number + 1) / len(parts))
    tokens = {
        of.index: TokenKinds(trace.tokens(of.index)["text"].tolist(), keys_of_spans(trace, of.index))
        for of in trace.sequences
    }
    rows_of_run = sum(trace.heads_of(layer).kv_heads for layer in trace.layers) * _scored_steps(replay, trace)
    return {
        "kind": "kvscope-regret",
        "schema": 1,
        "replay": str(replay.path),
        "trace": replay.info.trace.name,
        "runs": [_of_run(run, collected[run.run].result(tokens, rows_of_run)) for run in chosen],
    }


def keys_of_spans(trace: Trace, sequence: int) -> dict[str, list[int]]:
    """Return the positions of the tokens in the spans of each name that were recorded with a prompt, in order."""
    found: dict[str, set[int]] = {}
    for span in trace.record.sequences[sequence].spans:
        found.setdefault(span.name, set()).update(range(span.start, span.stop))
    return {name: sorted(keys) for name, keys in found.items()}


def _of_run(run: RunRecord, regret: Regret) -> RunRegret:
    return {
        "run": run.run,
        "policy": run.policy,
        "label": run.label,
        "budget": run.budget,
        "prefill": run.prefill,
        "loop": run.loop,
        **regret,
    }


def _scored_steps(replay: Replay, trace: Trace) -> int:
    """Return the number of steps at which something may have been evicted, over all sequences."""
    full = replay.info.prefill == "full"
    return sum(of.length - (of.prompt if full else 0) for of in trace.sequences)


def blocks(trace: Trace, sequence: int, layer: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield the first step and the rows of the key/value heads, the mean over their query heads, ``[G, b, n]``."""
    length = trace.sequences[sequence].length
    own = trace.heads_of(layer)
    size = max(1, BLOCK_BYTES // (4 * own.heads * length))
    for start in range(0, length, size):
        rows = trace.attention(sequence, layer, start, min(start + size, length))  # [H, b, n]
        yield start, rows.reshape(own.kv_heads, -1, *rows.shape[1:]).mean(axis=1)

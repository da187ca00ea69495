"""Which heads had evicted the fact that an answer states, at the end of the prompt."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from kvscope.results.store import Replay
from kvscope.results.stream import batches
from kvscope.trace.reader import Trace

NEEDLE = "needle"  # name of the spans of a prompt that hold what is asked for
COLUMNS = ("run", "sequence", "layer", "kv_head", "key", "enter", "leave")


def needle_tokens(trace: Trace) -> dict[int, list[int]]:
    """Return the positions of the tokens of the needle of every sequence that has one."""
    found = {}
    for number, sequence in enumerate(trace.record.sequences):
        tokens = {token for span in sequence.spans if span.name == NEEDLE for token in range(span.start, span.stop)}
        if tokens:
            found[number] = sorted(tokens)
    return found


def evicted_needles(replay: Replay, trace: Trace, runs: Collection[int]) -> dict[int, NDArray[np.float64]]:
    """Return for each run the share of the needle's tokens that each head has evicted at the end of the prompt.

    Each is ``[S, L, G]`` with NaN for sequences without a needle, and for heads that a layer has not. Residency is read
    in pieces, once.
    """
    info, needles = replay.info.trace, needle_tokens(trace)
    longest = max(sequence.length for sequence in info.sequences)
    wanted = np.zeros((len(info.sequences), longest), bool)
    for number, tokens in needles.items():
        wanted[number, tokens] = True
    numbers = {run: place for place, run in enumerate(sorted(runs))}
    held = np.zeros((len(numbers), len(info.sequences), len(info.layers), info.kv_heads))
    last = np.array([sequence.prompt - 1 for sequence in info.sequences])
    for table in batches(replay, "residency", sorted(runs), COLUMNS):
        run, sequence, layer, head, key, enter = (table[name].to_numpy() for name in COLUMNS[:-1])
        leave = table["leave"].fill_null(np.iinfo(np.int32).max).to_numpy()
        there = wanted[sequence, key] & (enter <= last[sequence]) & (leave > last[sequence])
        places = (np.searchsorted(sorted(numbers), run), sequence, np.searchsorted(info.layers, layer), head)
        np.add.at(held, tuple(place[there] for place in places), 1)
    count = wanted.sum(1).astype(float)
    count[count == 0] = np.nan
    evicted = 1 - held / count[None, :, None, None]
    for place, layer in enumerate(info.layers):
        evicted[:, :, place, info.heads_of(layer).kv_heads :] = np.nan
    return {run: evicted[place] for run, place in numbers.items()}

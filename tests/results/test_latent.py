"""What a latent cache must hold, over sequences of which some are near-copies."""

from dataclasses import replace

import numpy as np

from kvscope.core.residency import ResidencyIntervals
from kvscope.results.latent import LatentCounter
from kvscope.results.statistics import interval
from tests.results.make import info


def test_near_copies_are_drawn_as_one() -> None:
    lengths, copies = [6, 8, 10, 12, 14, 16], (0, 0, 1, 2, 3, 4)
    record = info(lengths)
    counter = LatentCounter(replace(record.trace, latent_size=8, near_copies=copies), record.runs)
    for sequence, length in enumerate(lengths):
        keys = np.arange(length, dtype=np.int32)
        columns = {"kv_head": np.zeros(length, np.int32), "key": keys, "enter": keys}
        intervals = ResidencyIntervals.of(**columns, leave=np.full(length, -1, np.int32), heads=2, length=length)
        for layer in (0, 1):
            counter.add(0, sequence, layer, intervals)
    found = counter.of(0)["latent_entries"]
    held = np.array([(length + 1) / 2 for length in lengths])  # nothing is evicted: 1, 2, ... length
    assert found.mean == held.mean()
    assert (found.low, found.high) == interval(held, clusters=copies) != interval(held)

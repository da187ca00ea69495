"""What a latent cache must hold: one vector for all heads of a layer, as long as any head holds its key."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvscope.core.records import RunRecord
from kvscope.results.store import Replay

NUMBER = 2  # bytes of a cached number: weights are published in 16 bit


@dataclass(frozen=True)
class LatentHeld:
    """Means over the steps that are scored, layers and sequences of one run.

    Attributes
    ----------
    entries : float
        Latent vectors that a layer holds: the union of the keys that its heads hold.
    keys : float
        Keys that a head holds.
    bytes : float
        Bytes of the latent vectors of all layers, in 16 bit.
    """

    entries: float
    keys: float
    bytes: float


def latent_held(replay: Replay, run: RunRecord) -> LatentHeld | None:
    """Return what a run holds in a latent cache.

    None if the model's cache is not latent, if the run reads keys but holds all, or if no step is scored.
    """
    trace, entries, keys = replay.info.trace, [], []
    if trace.latent_size is None or run.reads:
        return None
    frame = replay.residency(run.run)
    for number, sequence in enumerate(trace.sequences):
        first = sequence.prompt if run.prefill == "full" else 0
        steps = sequence.length - first
        if steps == 0:
            continue
        part = frame[frame["sequence"] == number]
        leave = part["leave"].fillna(sequence.length).to_numpy(dtype=np.int64)
        stays = np.maximum(leave - np.maximum(part["key"].to_numpy(dtype=np.int64), first), 0)  # scored steps
        longest = np.zeros((len(trace.layers), sequence.length), np.int64)
        place = np.searchsorted(trace.layers, part["layer"].to_numpy())
        np.maximum.at(longest, (place, part["key"].to_numpy()), stays)
        entries.append(longest.sum() / len(trace.layers) / steps)
        heads = sum(trace.heads_of(layer).kv_heads for layer in trace.layers)
        keys.append(stays.sum() / heads / steps)
    if not entries:
        return None
    mean = float(np.mean(entries))
    return LatentHeld(mean, float(np.mean(keys)), mean * trace.latent_size * NUMBER * len(trace.layers))

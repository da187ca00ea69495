"""Traces of store topk for tests, made in plain loops from whole rows, and their rows rebuilt in plain loops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from kvscope.trace.record import SequenceRecord
from kvscope.trace.schema import STORES
from kvscope.trace.stretches import stretches
from kvscope.trace.writer import TraceWriter
from tests.trace.make import header


def heaviest(row: np.ndarray, top: int) -> list[int]:
    """Return the positions of the heaviest weights of a row, ascending."""
    return sorted(sorted(range(len(row)), key=lambda key: -row[key])[:top])


def record(path: Path, rows: np.ndarray, top: int, prompt: int, *, window: int | None = None, block: int = 5) -> None:
    """Record rows ``[H, T, T]`` as layer 0 of a trace."""
    heads, length, _ = rows.shape
    facts = replace(
        header(heads, heads, list(STORES["topk"])),
        layers=[0],
        layer_types=["full"],
        sliding_window=[window],
        top=top,
    )
    ends = stretches(prompt, length)
    with TraceWriter(path, facts) as writer:
        first, since = 0, 0
        while first < length:
            stop = min(first + block, next(end for end in ends if end > first))
            width = min(top, stop)
            keys, weights = np.zeros((heads, stop - first, width), int), np.zeros((heads, stop - first, width))
            for head in range(heads):
                for query in range(first, stop):
                    own = heaviest(rows[head, query, : query + 1], top)
                    keys[head, query - first, : len(own)] = own
                    weights[head, query - first, : len(own)] = rows[head, query, own]
            kept = rows[:, first:stop].sum(-1)
            residual = np.array([[rest(rows[h, t, : t + 1], top) for t in range(first, stop)] for h in range(heads)])
            writer.topk(0, 0, first, keys, weights, row_sum=kept, residual=residual, log_sum_exp=np.zeros_like(kept))
            first = stop
            if stop in ends:
                outside = np.zeros((heads, stop))
                for head in range(heads):
                    for query in range(since, stop):
                        for key in set(range(query + 1)) - set(heaviest(rows[head, query, : query + 1], top)):
                            outside[head, key] += rows[head, query, key]
                writer.columns(0, 0, stop - 1, rows[:, since:stop, :stop].sum(1), outside)
                since = stop
        ones = np.ones((heads, length))
        writer.keys(0, 0, 0, value_l1=ones, value_l2=ones, key_l2=ones)
        writer.queries(0, 0, 0, np.ones((length, 3)))
        writer.tokens(
            0,
            token_id=range(length),
            text=["x"] * length,
            is_prompt=np.arange(length) < prompt,
            logprob=np.zeros(length),
            entropy=np.zeros(length),
        )
        writer.finish([SequenceRecord(prompt, length)])


def rest(row: np.ndarray, top: int) -> float:
    """Return what a row has outside its heaviest weights."""
    own = heaviest(row, top)
    return float(sum(row[key] for key in range(len(row)) if key not in own))


def rebuilt(rows: np.ndarray, top: int, prompt: int, window: int | None = None) -> np.ndarray:
    """Return what a reader must make of them, ``[H, T, T]``, key by key."""
    made = np.zeros_like(rows)
    length, start = rows.shape[1], 0
    for stop in stretches(prompt, length):
        for head in range(len(rows)):
            stored = {t: heaviest(rows[head, t, : t + 1], top) for t in range(start, stop)}
            lacks = {
                t: [k for k in range(t + 1) if k not in stored[t] and (window is None or k > t - window)]
                for t in range(start, stop)
            }
            residual = {t: rest(rows[head, t, : t + 1], top) for t in range(start, stop)}
            rate = np.zeros(stop)
            for key in range(stop):
                got = sum(rows[head, t, key] for t in range(start, stop) if key not in stored[t])
                asked = sum(residual[t] for t in range(start, stop) if key in lacks[t])
                rate[key] = got / asked if asked > 0 else 0
            for t in range(start, stop):
                total, least = rate[lacks[t]].sum(), rows[head, t, stored[t]].astype(np.float16).min()
                for key in lacks[t]:
                    share = residual[t] * rate[key] / total if total > 0 else 0
                    made[head, t, key] = min(share, np.nextafter(np.float32(least), np.float32(0)))
                made[head, t, stored[t]] = rows[head, t, stored[t]].astype(np.float16)
        start = stop
    return made

"""Time to compute the best schedule of evictions of one head, compared with scipy's assignment, and how exact it is.

``python benchmarks/belady.py [--budget 20] [--runs 3] [--output benchmarks/results/belady.json]``

Prefill is streaming. Up to 1,024 tokens, the rows are those of the bundled model on its prompt and the text that it
generates, for all heads of all layers. Beyond the context of the model they are random rows that resemble attention:
keys of unequal weight, a decay with distance, and matches of content. Each head is scheduled by kvscope and by scipy's
``linear_sum_assignment`` on the same costs, with one row for each eviction (the fastest formulation). Up to 2,048
tokens, scipy also solves the plain formulation, with the gains of all keys in all slots, including a slot for each key
that is never evicted. All three are timed in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from kvscope.bounds.schedules import schedule
from kvscope.core.options import ModelSource
from kvscope.model.generate import trace
from kvscope.model.loading import load
from kvscope.model.names import demo_folder

Floats = NDArray[np.float64]
REAL, RANDOM = (512, 1024), (512, 1024, 2048, 4096)
SEEDS = 3
PLAIN = 2048  # tokens up to which the plain formulation is timed
NEVER = 1e6  # cost of an impossible eviction; more than any schedule loses
HOW = (
    "CPU seconds of one thread; every figure is the median over heads of the median of the runs of a head, and 'worst' "
    "the largest of those. Ratios are formed head by head."
)


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=int, default=20, help="percent of the tokens")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--longest", type=int, default=max(RANDOM))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/belady.json"))
    args = parser.parse_args()
    rows = []
    for kind, tokens, heads in maps(args.longest):
        rows.append({"rows": kind, "tokens": tokens, "budget_percent": args.budget} | measure(heads, args))
        print(json.dumps(rows[-1]), flush=True)
    figures = {"how": HOW, "machine": machine(), "runs": args.runs, "schedules": rows}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")


def maps(longest: int) -> Iterator[tuple[str, int, list[Floats]]]:
    """Yield kind, length and the full rows ``[T, T]`` of some heads."""
    real = bundled(min(longest, max(REAL)))
    yield from (("bundled model", size, [head[:size, :size] for head in real]) for size in REAL if size <= longest)
    for size in RANDOM:
        if size <= longest:
            yield "random", size, [random_rows(size, seed) for seed in range(SEEDS)]


def bundled(tokens: int) -> list[Floats]:
    """Return the rows of every key/value head of the bundled model, ``[T, T]`` each."""
    prompt = demo_folder() / "prompt.txt"
    new = max(REAL) - len(load(ModelSource("demo")).tokenizer(prompt.read_text(encoding="utf-8"))["input_ids"])
    with tempfile.TemporaryDirectory() as folder:
        made = trace("demo", [prompt], output=Path(folder) / "trace", max_new_tokens=new)
        length = min(tokens, made.sequences[0].length)
        heads = []
        for layer in made.layers:
            rows = made.attention(0, layer, 0, length).astype(np.float64)  # [H, T, T]
            share = rows / rows.sum(-1, keepdims=True)
            heads += list(share.reshape(made.kv_heads, -1, length, length).mean(1))
    return heads


def random_rows(tokens: int, seed: int) -> Floats:
    """Return rows with keys of unequal weight, a decay with distance, and matches of content, in 16 bit."""
    random = np.random.default_rng(seed)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    query, key = random.normal(size=(2, tokens, 16))
    logits = 1.2 * random.normal(size=tokens) + 0.5 * query @ key.T - 0.7 * np.log1p(np.maximum(distance, 0))
    logits[:, :2] += 4.0  # sinks
    weights = np.exp(np.where(distance >= 0, logits, -np.inf) - logits.max(1, keepdims=True))
    return (weights / weights.sum(1, keepdims=True)).astype(np.float16).astype(np.float64)


def measure(heads: list[Floats], args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of some heads of one length."""
    tokens = len(heads[0])
    budget = tokens * args.budget // 100
    ways: dict[str, Callable[[Floats, int], float]] = {"kvscope": by_kvscope, "scipy": by_scipy}
    if tokens <= PLAIN:
        ways["scipy_plain"] = by_scipy_plain
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    gap = 0.0
    for rows in heads:
        after = np.tril(rows, -1)[budget + 1 :]  # rows after the first eviction; their own keys are always visible
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.runs):
            lost = {}
            for name, way in ways.items():
                start = time.process_time()
                lost[name] = way(after, budget)
                taken[name].append(time.process_time() - start)
            assert max(lost.values()) - min(lost.values()) < 1e-6 * max(1, lost["scipy"]), lost
        for name, values in taken.items():
            seconds[name].append(statistics.median(values))
        _, found, least = schedule(after, budget)
        gap = max(gap, abs(found - least))
    figures: dict[str, Any] = {"heads": len(heads), "largest_gap": gap}
    for name, values in seconds.items():
        figures[name] = {"median": round(statistics.median(values), 4), "worst": round(max(values), 4)}
        if name != "kvscope":
            ratios = [other / own for other, own in zip(values, seconds["kvscope"], strict=True)]
            figures[name]["times_kvscope_median"] = round(statistics.median(ratios), 2)
    return figures


def by_kvscope(after: Floats, budget: int) -> float:
    """Return the mass that the best schedule loses."""
    return schedule(after, budget)[1]


def by_scipy(after: Floats, budget: int) -> float:
    """Return the same; a cost is the mass that a key would still receive after an eviction."""
    count, tokens = after.shape
    cost = after[::-1].cumsum(0)[::-1]
    cost[np.arange(tokens) > np.arange(tokens - 1 - count, tokens - 1)[:, None]] = NEVER
    return float(cost[linear_sum_assignment(cost)].sum())


def by_scipy_plain(after: Floats, budget: int) -> float:
    """Return the same; a gain is the mass that a key has received by its eviction, or by the end."""
    count, tokens = after.shape
    gathered = np.concatenate([np.zeros((1, tokens)), after.cumsum(0)])
    gain = np.concatenate([gathered[:-1], np.repeat(gathered[-1:], budget + 1, axis=0)])
    gain[:count][np.arange(tokens) > np.arange(tokens - 1 - count, tokens - 1)[:, None]] = -NEVER
    return float(after.sum() - gain[linear_sum_assignment(gain, maximize=True)].sum())


if __name__ == "__main__":
    main()

"""Why the bundled model orders policies otherwise than the models of papers: what `kvscope reproduce` says of claims.

``python benchmarks/reproduce_reasons.py [--store .] [--output benchmarks/results/reproduce_reasons.json]``

On the texts that come with the papers: the weight of the first key, to see whether it is a sink; perplexity and cosine
with and without a protected newest half, in the closed loop with streaming prefill; how often the newest keys of a full
row are among its heaviest, which Recycled Attention selects; and its loss by the steps since the last full one, in nats
above that of the full cache. On needles: how much the norms of values differ. Perplexity is of all texts together.
``--store`` is a folder with ``traces`` and ``reports``, in which what is there is not computed again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

from kvscope.core.experiment_records import ExperimentRecord
from kvscope.experiments.cells import Store
from kvscope.experiments.experiment import Experiment
from kvscope.experiments.paper import packaged
from kvscope.experiments.plan import make_plan
from kvscope.experiments.run import run_here, summarise
from kvscope.experiments.spec import experiment_of
from kvscope.results.store import open_replay
from kvscope.trace.reader import Trace, open_trace

TEXTS = {
    "model": "demo",
    "prompts": str(packaged("passages.jsonl")),
    "max_new_tokens": 1,
    "steps": ["trace", "replay", "closed-loop"],
    "metrics": ["ideal_cosine", "retained_mass"],
}
FROM = 100  # rows before this one have too few keys to tell a sink
PROTECTED = {
    "per head": {
        "budgets": "20%",
        "policies": [
            *("window", "h2o", "h2o:recent=0", "a2sf", "a2sf:recent=40"),
            *("a2sf:alpha=0.1", "a2sf:alpha=0.1,recent=40"),
        ],
    },
    "per layer": {
        "budgets": "12.5%",
        "scope": "layer",
        "policies": ["window", "tova", "a2sf:alpha=0", "a2sf:alpha=0,recent=25"],
    },
}
RECYCLED = {
    "prefill": "full",
    "budgets": "12.5%",
    "policies": [
        "recycled-attention:stride=10",
        *(f"refreshkv:{each}" for each in ("schedule=fixed,stride=10", "schedule=fixed,stride=15", "compare_every=5")),
    ],
}
HEAVIEST, EVERY, NEWEST = 25, 10, 4


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path())
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/reproduce_reasons.json"))
    args = parser.parse_args()
    store = Store.under(args.store / "traces", args.store / "reports")
    protected = {name: ran({**TEXTS, "prefill": "stream", **keys}, store) for name, keys in PROTECTED.items()}
    recycled, text = ran({**TEXTS, **RECYCLED}, store)
    needles = {**TEXTS, "prompts": None, "tasks": "needle:wording=notes", "lengths": 256, "examples": 24}
    _, asked = ran({**needles, "max_new_tokens": 6, "steps": "trace"}, store)
    figures = {
        "machine": machine(),
        "model": "demo",
        "first_key": first_key(text),
        "protected": {name: list(rows(record)) for name, (record, _) in protected.items()},
        "newest_of_a_full_row": newest(text),
        "loss_since_full_step": dict(losses(recycled, store)),
        "value_norms": value_norms(asked),
    }
    args.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def ran(keys: dict[str, Any], store: Store) -> tuple[ExperimentRecord, Trace]:
    """Return the summary of an experiment, and its only trace."""
    given = {name: value for name, value in keys.items() if value is not None}
    experiment: Experiment = experiment_of(given, "reasons", "reasons")
    plan = make_plan(experiment, store, "cpu")
    record = summarise(plan, run_here(plan))
    assert not record.failed, record.failed
    return record, open_trace(plan.cells[0].path)


def rows(record: ExperimentRecord) -> Iterator[dict[str, Any]]:
    """Yield perplexity and cosine of every policy."""
    for run in record.runs:
        means = {name: round(run.mean(name) or 0.0, 4) for name in ("perplexity", "perplexity_ratio", "ideal_cosine")}
        yield {"policy": run.policy, "budget": run.budget, **means}


def first_key(trace: Trace) -> dict[str, float]:
    """Return the mean weight of the first key, and an even share of the same rows."""
    weights, even = [], []
    for sequence, layer in places(trace):
        attention = np.asarray(trace.attention(sequence, layer), np.float64)[:, FROM:]  # [H, T - FROM, T]
        weights.append(attention[..., 0].mean())
        even.append(np.mean(1 / np.arange(FROM + 1, FROM + 1 + attention.shape[1])))
    return {"weight": round(float(np.mean(weights)), 5), "even_share": round(float(np.mean(even)), 5)}


def newest(trace: Trace) -> dict[str, float]:
    """Return how often the key of a row is among its heaviest, and how often each of the newest four is."""
    own, four = [], []
    for sequence, layer in places(trace):
        attention = np.asarray(trace.attention(sequence, layer))
        heads, length, _ = attention.shape
        groups = trace.heads_of(layer).kv_heads
        grouped = attention.reshape(groups, heads // groups, length, length).max(1)
        for row in range(length // 2, length, EVERY):
            heaviest = np.argsort(grouped[:, row, : row + 1], kind="stable")[:, -HEAVIEST:]
            inside = [(heaviest == row - age).any(-1).mean() for age in range(NEWEST)]
            own.append(inside[0])
            four.append(np.mean(inside))
    return {"heaviest": HEAVIEST, "own_key": round(float(np.mean(own)), 3), "newest_4": round(float(np.mean(four)), 3)}


def losses(record: ExperimentRecord, store: Store) -> Iterator[tuple[str, list[float]]]:
    """Yield of each policy the excess loss of a query, by the number of steps since the end of the prompt modulo 10."""
    for folder in record.replays:
        replay = open_replay(store.replays / folder)
        prompts = np.array([one.prompt for one in replay.info.trace.sequences])
        for run in replay.info.runs:
            if run.loop == "closed":
                tokens = replay.tokens(run.run)
                since = (tokens["position"].to_numpy() - prompts[tokens["sequence"]]) % EVERY
                excess = (tokens["nll_policy"] - tokens["nll_full"]).to_numpy()
                yield run.label, [round(float(excess[since == step].mean()), 3) for step in range(EVERY)]


def value_norms(trace: Trace) -> dict[str, float]:
    """Return the spread of the L1 norms of values, over their mean, and the norm of the first key over the median."""
    spread, first = [], []
    for sequence, layer in places(trace):
        norms = np.asarray(trace.value_norms(sequence, layer), np.float64)  # [G, T]
        spread.append((norms.std(-1) / norms.mean(-1)).mean())
        first.append((norms[:, 0] / np.median(norms, -1)).mean())
    return {"spread": round(float(np.mean(spread)), 3), "first_over_median": round(float(np.mean(first)), 3)}


def places(trace: Trace) -> Iterator[tuple[int, int]]:
    """Yield every sequence and layer."""
    return ((sequence, layer) for sequence in range(len(trace.sequences)) for layer in trace.layers)


if __name__ == "__main__":
    main()

"""The speed of a replay: score updates per second, compared with reading the trace, at several lengths.

``python benchmarks/replay_speed.py [--runs 5] [--output benchmarks/results/replay_speed.json]``

A score update is one key that a query attends to, in one head, layer and step of one run. The bundled model reads 1,024
tokens of books that it was not trained on, with eviction from the first token on. ``stepping`` is the engine alone over
rows in memory, with kernels and in torch. ``replay`` is `kvscope.replay` including its files, with retained mass alone
and with all metrics. ``reading`` reads the stored rows once. Figures are medians of measurements taken in turn in one
process, and ratios are computed round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from machine import machine

import kvscope
import kvscope.engine.simulation as engine
from kvscope.core.budget import parse_budgets
from kvscope.core.options import ModelSource
from kvscope.engine.layers import RecordedLayers
from kvscope.engine.rows import Block
from kvscope.engine.simulation import CacheSimulation
from kvscope.model.loading import load
from kvscope.policies.spec import parse_policies
from kvscope.trace.reader import Trace

DATA = Path(__file__).parents[1] / "tests" / "data" / "demo_heldout.json"
POLICIES = ["h2o", "a2sf", "tova"]
BUDGETS = "5%,10%,15%,20%,25%,30%,40%,50%"
BLOCK = 64


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="*", default=[256, 512, 1024])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/replay_speed.json"))
    args = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine(), "policies": POLICIES, "budgets": BUDGETS, "by_length": []}
    with tempfile.TemporaryDirectory() as folder:
        for length in args.lengths:
            figures["by_length"].append(of_length(length, Path(folder) / str(length), args.runs))
            print(json.dumps(figures["by_length"][-1], indent=1), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")


def of_length(length: int, folder: Path, runs: int) -> dict[str, Any]:
    """Return the figures of a trace of so many tokens."""
    traces = {store: record(length, folder, store) for store in ("maps", "qkv")}
    trace, rows = traces["maps"], all_rows(traces["maps"])
    one, many = stepping(trace, rows, ["h2o"], "20%"), stepping(trace, rows, POLICIES, BUDGETS)
    number = [0]

    def replay(store: str, policies: list[str], budgets: str, metrics: list[str] | None = None) -> None:
        number[0] += 1
        output = folder / f"out-{number[0]}"
        kvscope.replay(traces[store], policies, budgets, output=output, prefill="stream", metrics=metrics)

    work: dict[str, Callable[[], object]] = {
        "reading": lambda: all_rows(trace),
        "reading_qkv": lambda: all_rows(traces["qkv"]),
        "stepping_1": one,
        "stepping_24": many,
        "stepping_24_torch": in_torch(trace, rows),
        "replay_1": lambda: replay("maps", ["h2o"], "20%"),
        "replay_24": lambda: replay("maps", POLICIES, BUDGETS),
        "replay_1_mass": lambda: replay("maps", ["h2o"], "20%", ["retained_mass"]),
        "replay_24_mass": lambda: replay("maps", POLICIES, BUDGETS, ["retained_mass"]),
        "replay_24_qkv": lambda: replay("qkv", POLICIES, BUDGETS),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for lap in range(runs + 1):
        for name, run in work.items():
            if name == "stepping_24_torch" and lap > 1:
                continue  # slow and steady: measured once
            took = timed(run)
            if lap:  # the first round compiles
                seconds[name].append(took)
    updates = {1: many_updates(trace, ["h2o"], "20%"), 24: many_updates(trace, POLICIES, BUDGETS)}
    return {
        "tokens": length,
        "layers": len(trace.layers),
        "heads": trace.heads,
        "updates": updates[24],
        "seconds": {name: summary(values) for name, values in seconds.items()},
        "million_updates_per_second": {
            name: round(updates[24] / statistics.median(seconds[name]) / 1e6, 1)
            for name in ("stepping_24", "stepping_24_torch", "replay_24_mass", "replay_24")
        },
        "ratios": {
            "replay_24_over_1": ratio(seconds, "replay_24", "replay_1"),
            "replay_24_mass_over_1": ratio(seconds, "replay_24_mass", "replay_1_mass"),
            "reading_of_replay_1": ratio(seconds, "reading", "replay_1"),
            "reading_of_replay_24": ratio(seconds, "reading", "replay_24"),
            "replay_24_qkv_over_maps": ratio(seconds, "replay_24_qkv", "replay_24"),
        },
    }


def record(length: int, folder: Path, store: Any, **more: Any) -> Trace:
    """Return a trace of so many tokens of held-out text; `more` goes to `kvscope.trace`."""
    folder.mkdir(exist_ok=True)
    text = " ".join(json.loads(DATA.read_text())["passages"])[: 8 * length]  # more than enough
    tokenizer = load(ModelSource("demo")).tokenizer
    ids = tokenizer(text)["input_ids"][: length - 40]  # words may be cut into other tokens the second time
    prompt = folder / f"{store}.txt"
    prompt.write_text(tokenizer.decode(ids[1:]))
    return kvscope.trace("demo", [prompt], output=folder / f"trace-{store}", store=store, max_new_tokens=32, **more)


def all_rows(trace: Trace) -> list[torch.Tensor]:
    """Return all rows of a trace, block by block."""
    source = RecordedLayers(trace, trace.sequences[0], trace.layers, torch.device("cpu"))
    length = source.shape.length
    return [source.rows(start, min(start + BLOCK, length)) for start in range(0, length, BLOCK)]


def simulations(trace: Trace, policies: list[str], budgets: str) -> list[CacheSimulation]:
    """Return a simulation of each policy under all budgets, all compiled."""
    sequence = trace.sequences[0]
    shape = RecordedLayers(trace, sequence, trace.layers, torch.device("cpu")).shape
    keys = [
        budget.keys(prompt=sequence.prompt, length=sequence.length, prefill="stream")
        for budget in parse_budgets(budgets)
    ]
    return [CacheSimulation(policy, keys, shape, "stream") for policy in parse_policies(policies)]


def stepping(trace: Trace, rows: list[torch.Tensor], policies: list[str], budgets: str) -> Callable[[], None]:
    """Return a function that steps policies through rows in memory."""

    def step() -> None:
        for simulation in simulations(trace, policies, budgets):
            for number, block in enumerate(rows):
                simulation.block(Block(block, number * BLOCK))

    return step


def in_torch(trace: Trace, rows: list[torch.Tensor]) -> Callable[[], None]:
    """Return the same, without kernels."""

    def step() -> None:
        with mock.patch.object(engine, "available", return_value=False):
            stepping(trace, rows, POLICIES, BUDGETS)()

    return step


def many_updates(trace: Trace, policies: list[str], budgets: str) -> int:
    """Return how many keys all queries of all heads attend to: at most the budget and the query's own."""
    sequence = trace.sequences[0]
    keys = [
        budget.keys(prompt=sequence.prompt, length=sequence.length, prefill="stream")
        for budget in parse_budgets(budgets)
    ]
    seen = sum(min(t + 1, budget + 1) for budget in keys for t in range(sequence.length))
    return seen * len(policies) * len(trace.layers) * trace.heads


def timed(run: Callable[[], object]) -> float:
    """Return seconds."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def ratio(seconds: dict[str, list[float]], one: str, other: str) -> dict[str, Any]:
    """Return the ratio of two measurements, round by round."""
    return summary([a / b for a, b in zip(seconds[one], seconds[other], strict=True)])


def summary(values: list[float]) -> dict[str, Any]:
    """Return the median and the range."""
    return {"median": round(statistics.median(values), 4), "range": [round(min(values), 4), round(max(values), 4)]}


if __name__ == "__main__":
    main()

"""The cost of a report: time and memory to build it, size of the page, and time until it can be read.

``python benchmarks/report_build.py [--lengths 1024 4096 8192] [--output benchmarks/results/report_build.json]``

The model has 32 layers of 32 heads, without grouped queries. A prompt with full prefill is followed by 128 tokens. Six
runs are three policies that hold sinks, scattered keys and a window, under two budgets. Trace and replay are synthetic,
and are written to disk like real ones. The trace stores vectors of only four numbers, so that it fits on a laptop, from
which attention rows are recomputed. Times until the page can be read are measured in headless Chromium: first paint,
the overview, all panels drawn.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from chromium import appeared, launch
from machine import machine
from playwright.sync_api import sync_playwright

from kvscope.core.records import REPLAY, ReplayRecord
from kvscope.core.residency import ResidencyIntervals
from kvscope.report.page import page_data, report, report_input
from kvscope.results.store import Replay
from kvscope.results.writer import ReplayWriter
from kvscope.trace.layer_records import LayerAttention
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.record import ModelRecord, PromptRecord, SequenceRecord, TraceHeader
from kvscope.trace.schema import STORES
from kvscope.trace.writer import TraceWriter

LAYERS, HEADS, SIZE, NEW = 32, 32, 4, 128
POLICIES, BUDGETS = ("h2o", "tova", "a2sf"), (0.1, 0.2)
METRICS = ("retained_mass", "retained_mass_no_sinks", "ideal_mass", "ideal_cosine", "full_cosine", "output_error")
KEYS = ("read_keys", "held_keys")


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 8192])
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/report_build.json"))
    args = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine(), "layers": LAYERS, "heads": HEADS, "runs": 6, "tokens": {}}
    for length in sorted(args.lengths):
        with tempfile.TemporaryDirectory() as folder:
            figures["tokens"][str(length)] = measure(Path(folder), length)
        print(length, json.dumps(figures["tokens"][str(length)], indent=1), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")


def measure(folder: Path, length: int) -> dict[str, Any]:
    """Return the figures of one length."""
    trace = synthetic_trace(folder / "trace", length)
    replay = synthetic_replay(folder / "replay", trace, length)
    started = time.monotonic()
    page = report([replay], {trace.identity: trace}, folder / "page.html")
    seconds = time.monotonic() - started
    data = page_data(report_input([replay], {trace.identity: trace}))
    return {
        "build_seconds": round(seconds, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "residency_mib": round((replay.path / "residency.parquet").stat().st_size / 2**20, 1),
        "page_mib": round(page.stat().st_size / 2**20, 2),
        "panel_mib": {each["name"]: round(len(json.dumps(each)) / 2**20, 2) for each in data["panels"]},
        "opened": opened(page),
    }


def opened(page: Path) -> dict[str, float]:
    """Return seconds from navigation to the first paint, to the overview, and to the last panel."""
    with sync_playwright() as started:
        browser = launch(started)
        tab = browser.new_page(viewport={"width": 1400, "height": 900})
        seen = appeared(tab, page, {"overview": "#overview tbody tr", "all": "html[data-ready]"})
        seen["paint"] = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        browser.close()
    return {name: round(seen[name] / 1000, 2) for name in ("paint", "overview", "all")}


def synthetic_trace(path: Path, length: int) -> Trace:
    """Return a trace of vectors whose attention favours the first keys and the newest."""
    random = np.random.default_rng(0)
    header = TraceHeader(
        source="model",
        protocol="generated",
        model=ModelRecord(id="synthetic"),
        layers=list(range(LAYERS)),
        n_layers=LAYERS,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=SIZE,
        layer_types=["full"] * LAYERS,
        sliding_window=[None] * LAYERS,
        stored=list(STORES["qkv"]),
        attention=[LayerAttention(scaling=1.0)] * LAYERS,
        prompts=[PromptRecord(file="prompt.txt", sha256="0")],
    )
    position = np.arange(length, dtype=np.float32)
    with TraceWriter(path, header) as writer:
        for layer in range(LAYERS):
            queries, keys, values = random.normal(size=(3, HEADS, length, SIZE)).astype(np.float32)
            queries[..., 0], keys[..., 0] = 1, 6 * (position < 4) + 8 * position / length
            writer.vectors(layer, 0, 0, queries=queries, keys=keys, values=values)
        writer.tokens(
            0,
            token_id=np.arange(length),
            text=[f" word{number % 977}" if number % 19 else "\n" for number in range(length)],
            is_prompt=position < length - NEW,
            logprob=-random.random(length),
            entropy=random.random(length),
        )
        writer.finish([SequenceRecord(length - NEW, length)])
    return open_trace(path)


def synthetic_replay(path: Path, trace: Trace, length: int) -> Replay:
    """Return a replay of six runs."""
    prompt = length - NEW
    runs = [
        {
            "run": number,
            "policy": policy,
            "label": policy,
            "params": {},
            "budget": f"{share:.0%}",
            "budget_keys": [int(share * prompt)],
            "prefill": "full",
            "phase": "step",
            "loop": "open",
            "scope": "kv_head",
        }
        for number, (policy, share) in enumerate((policy, share) for policy in POLICIES for share in BUDGETS)
    ]
    declared = {name: {"direction": "higher", "range": [0.0, 1.0], "summary": ""} for name in METRICS}
    declared |= {name: {"direction": "none", "range": [0.0, None], "summary": ""} for name in KEYS}
    about = {
        "name": trace.name,
        "path": str(trace.path),
        "identity": trace.identity,
        "model": "synthetic",
        "sequences": [{"prompt": prompt, "length": length}],
        "layers": list(trace.layers),
        "heads": HEADS,
        "kv_heads": HEADS,
    }
    info = {"trace": about, "prefill": "full", "loop": "open", "metrics": declared, "runs": runs, "versions": {}}
    random = np.random.default_rng(1)
    record = REPLAY.decode({**info, "command": None}, path, ReplayRecord)
    with ReplayWriter(path, record) as writer:
        for run in runs:
            budget = int(run["budget_keys"][0])
            for layer in range(LAYERS):
                intervals = ResidencyIntervals.from_eviction_steps(leaving(random, length, budget))
                writer.residency(run["run"], 0, layer, intervals)
                values = {name: random.random((HEADS, NEW)) for name in METRICS}
                values |= {name: np.full((HEADS, NEW), float(budget)) for name in KEYS}
                writer.fidelity(run["run"], 0, layer, np.arange(prompt, length), values)
        return writer.finish()


def leaving(random: np.random.Generator, length: int, budget: int) -> np.ndarray:
    """Return the step at which each key is evicted, ``[G, T]``: sinks, scattered keys and a window are retained."""
    prompt, recent = length - NEW, budget // 2
    leave = np.maximum(np.arange(length) + recent, prompt - 1) + np.zeros((HEADS, 1), int)
    scattered = random.random((HEADS, prompt - recent)) < (budget - recent) / (prompt - recent)
    later = random.integers(prompt, length + NEW, scattered.shape)
    leave[:, : prompt - recent] = np.where(scattered, later, prompt - 1)
    leave[:, :4] = length
    return leave


if __name__ == "__main__":
    main()

"""Evict keys, store them in fewer bits, or both: bytes of the cache against perplexity and right answers.

``python benchmarks/quantised_caches.py [--passages 2] [--questions 3] [--output FILE]``

The bundled model reads passages of books that it was not trained on, and episodes in which a fact is stated and asked
for later (those of ``benchmarks/outcomes.py``). Policies evict at the end of the prompt (half of a passage, or all of
an episode but the answer) and most of them at every step after it. Caches are in 16 bit and, as KIVI has them, in 8, 4,
3 and 2 bit, with groups of 32 and a residual window of 32. Perplexity is over the second halves of the passages, in the
closed loop. An answer is right if the model, decoding with the shortened cache, says it. Bytes are the mean over steps
of all layers and key/value heads of a sequence: codes, scales, zero points, and what is in 16 bit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import machine
from outcomes import DATA, counted, halves, rounded

import kvscope
from kvscope.core.options import ClosedLoopOptions, GenerateOptions, OutputOptions, PlanOptions, ReplayOptions
from kvscope.replay.compile import compile_replay
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace

POLICIES = ("full", "streaming-llm", "h2o", "tova", "snapkv", "a2sf")
BUDGETS = "10%,20%,40%,80%"
CACHES = ("16bit", *(f"int{bits}:kivi(group=32,residual=32)" for bits in (8, 4, 3, 2)))


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=2)
    parser.add_argument("--questions", type=int, default=3, help="per distance")
    parser.add_argument("--keep", type=Path, help="folder for the replays, for a report")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/quantised_caches.json"))
    args = parser.parse_args()
    data = json.loads(DATA.read_text())
    figures: dict[str, Any] = {"machine": machine(), "model": "demo", "budgets": BUDGETS, "caches": CACHES}
    with tempfile.TemporaryDirectory() as made:
        folder = args.keep or Path(made)
        text = replayed(record(folder, "text", halves(data["passages"][: args.passages])), folder, answers=False)
        asked = [one for one in data["recall"] if counted(one, data["recall"]) < args.questions]
        examples = [(one["prompt"], one["value"], one["value"]) for one in asked]
        recall = replayed(record(folder, "recall", examples), folder, answers=True)
        figures["questions"] = len(asked)
        figures["rows"] = rows(text, recall)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")
    for row in figures["rows"]:
        print(*row.values(), sep="\t")


def record(folder: Path, name: str, parts: Sequence[Sequence[str]]) -> Trace:
    """Return a trace of prompts and their forced continuations; a third part of each is its right answer."""
    prompts = folder / f"{name}.jsonl"
    fields = ("prompt", "continuation", "answers")
    lines = [
        {**dict(zip(fields, part, strict=False)), **({"answers": [part[2]]} if part[2:] else {})} for part in parts
    ]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return kvscope.trace("demo", [prompts], output=folder / name, store="maps", force=True)


def replayed(trace: Trace, folder: Path, *, answers: bool) -> Replay:
    """Return every policy with every cache, at all budgets, in the closed loop."""
    options = ReplayOptions(
        plan=PlanOptions(caches=CACHES),
        metrics=("full_cosine", "held_keys", "retained_mass"),
        closed=ClosedLoopOptions(),
        generate=GenerateOptions() if answers else None,
    )
    job = compile_replay(trace, POLICIES, BUDGETS, options)
    print(f"{trace.name}: {len(job.runs)} runs", flush=True)
    return job.execute(OutputOptions(folder / f"replay-{trace.name}", force=True))


def rows(text: Replay, recall: Replay) -> list[dict[str, Any]]:
    """Return a row for each policy, budget and cache."""
    answered = {(run.label, run.budget): run for run in recall.summary.runs if run.loop == "closed"}
    heads = len(text.info.trace.layers) * text.info.trace.kv_heads
    found = []
    for run in text.summary.runs:
        if run.loop != "closed":
            continue
        other = answered[run.label, run.budget]
        found.append(
            {
                "policy": run.policy,
                "budget": run.budget,
                "cache": run.cache or "16bit",
                "kibibytes": rounded((run.mean("cache_bytes") or 0) * heads / 1024),
                "kibibytes_recall": rounded((other.mean("cache_bytes") or 0) * heads / 1024),
                "perplexity": rounded(run.mean("perplexity")),
                "perplexity_ratio": rounded(run.mean("perplexity_ratio")),
                "answers": rounded(answer_score(other.metrics)),
            }
        )
    return found


def answer_score(metrics: Mapping[str, Any]) -> float | None:
    """Return the share of right answers."""
    found = next((value for name, value in metrics.items() if name.startswith("answer")), None)
    return None if found is None else found.mean


if __name__ == "__main__":
    main()

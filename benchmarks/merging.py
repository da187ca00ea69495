"""Evict keys, or merge them into those that stay: perplexity and right answers of each rule beside three policies.

``python benchmarks/merging.py [--passages 2] [--questions 3] [--output FILE]``

The bundled model reads passages of books that it was not trained on, and episodes in which a fact is stated and asked
for later (those of ``benchmarks/outcomes.py``). ``full`` evicts at the end of the first half of a passage, then at
every step, and scores the second half; ``stream`` evicts from the first token on, and scores all. Answers are generated
with the merged cache after a prompt with full prefill. Everything is in the closed loop.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from machine import machine
from outcomes import DATA, counted, halves, rounded
from quantised_caches import answer_score, record

from kvscope.core.options import ClosedLoopOptions, GenerateOptions, OutputOptions, PlanOptions, Prefill, ReplayOptions
from kvscope.replay.compile import compile_replay
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace

POLICIES = ("streaming-llm", "h2o", "tova")
BUDGETS = "20%,40%"
MERGES = ("none", "cam", "cam(chance=max)", "d2o", "kvmerger")


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=2)
    parser.add_argument("--questions", type=int, default=3, help="per distance")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/merging.json"))
    args = parser.parse_args()
    data = json.loads(DATA.read_text())
    figures: dict[str, Any] = {"machine": machine(), "model": "demo", "budgets": BUDGETS, "merges": MERGES}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        text = record(folder, "text", halves(data["passages"][: args.passages]))
        asked = [one for one in data["recall"] if counted(one, data["recall"]) < args.questions]
        recall = record(folder, "recall", [(one["prompt"], one["value"], one["value"]) for one in asked])
        found = [
            replayed(text, folder, Prefill.full),
            replayed(text, folder, Prefill.stream),
            replayed(recall, folder, Prefill.full, answers=True),
        ]
        figures["questions"] = len(asked)
        figures["tokens"] = {trace.name: sum(one.length for one in trace.sequences) for trace in (text, recall)}
        figures["rows"] = rows(*found)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")
    for row in figures["rows"]:
        print(*row.values(), sep="\t")


def replayed(trace: Trace, folder: Path, prefill: Prefill, *, answers: bool = False) -> Replay:
    """Return every policy with every rule, at all budgets, in the closed loop."""
    options = ReplayOptions(
        prefill=prefill,
        plan=PlanOptions(merges=MERGES),
        metrics=("full_cosine", "retained_mass"),
        closed=ClosedLoopOptions(),
        generate=GenerateOptions() if answers else None,
    )
    job = compile_replay(trace, POLICIES, BUDGETS, options)
    print(f"{trace.name}, {prefill}: {len(job.runs)} runs", flush=True)
    return job.execute(OutputOptions(folder / f"replay-{trace.name}-{prefill}", force=True))


def rows(full: Replay, stream: Replay, recall: Replay) -> list[dict[str, Any]]:
    """Return a row for each policy, budget and rule."""
    by_run = [
        {(run.label, run.budget): run for run in replay.summary.runs if run.loop == "closed"}
        for replay in (full, stream, recall)
    ]
    return [
        {
            "policy": run.policy,
            "budget": run.budget,
            "merge": run.merge or "none",
            "full_perplexity_ratio": rounded(run.mean("perplexity_ratio")),
            "stream_perplexity_ratio": rounded(by_run[1][key].mean("perplexity_ratio")),
            "full_full_cosine": rounded(run.mean("full_cosine")),
            "stream_full_cosine": rounded(by_run[1][key].mean("full_cosine")),
            "answers": rounded(answer_score(by_run[2][key].metrics)),
        }
        for key, run in by_run[0].items()
    ]


if __name__ == "__main__":
    main()

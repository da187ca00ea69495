"""Rebuild the committed replay of quantised caches: reports/example-quantised.

python tools/quantised_example.py

The bundled model reads a passage and answers questions, both held out (tests/data/demo_heldout.json). Policies evict at
two budgets, with caches in 16, 4 and 2 bit. Its trace is not kept: the page has its numbers, and no text. Figures of
more passages, questions and policies are in benchmarks/results/quantised_caches.json.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from kvscope.cli.app import run
from kvscope.core.options import ClosedLoopOptions, GenerateOptions, OutputOptions, PlanOptions, ReplayOptions
from kvscope.replay.compile import compile_replay
from kvscope.trace.reader import open_trace

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "tests" / "data" / "demo_heldout.json"
WORDS = 700  # characters of the passage
QUESTIONS = 3
PROMPTS = Path("traces") / "quantised.jsonl"
TRACE = f"trace --model demo {PROMPTS} --output quantised --store maps --force --quiet"
POLICIES, BUDGETS = ("full", "streaming-llm", "h2o", "snapkv"), "20%,50%"
CACHES = ("16bit", "int4:kivi(group=16,residual=16)", "int2:kivi(group=16,residual=16)")


def main() -> int:
    """Return the exit status of the recording."""
    os.chdir(ROOT)
    PROMPTS.write_text("".join(json.dumps(line) + "\n" for line in prompts()))
    try:
        status = run(shlex.split(TRACE))
        if status == 0:
            replay()
    finally:
        PROMPTS.unlink()
        shutil.rmtree("traces/quantised", ignore_errors=True)
    return status


def replay() -> None:
    """Replay every policy with every cache in the closed loop."""
    options = ReplayOptions(
        plan=PlanOptions(caches=CACHES),
        metrics=("held_keys", "retained_mass"),
        closed=ClosedLoopOptions(),
        generate=GenerateOptions(),
    )
    job = compile_replay(open_trace(Path("traces/quantised")), POLICIES, BUDGETS, options)
    job.execute(OutputOptions(Path("reports/example-quantised"), force=True))


def prompts() -> list[dict[str, object]]:
    """Return a passage in two parts, and questions with their right answers, the nearest facts first."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    text = data["passages"][0][:WORDS]
    cut = text.index(" ", len(text) // 2)
    asked = sorted(data["recall"], key=lambda one: len(one["prompt"]))[:QUESTIONS]
    questions = [{"prompt": one["prompt"], "continuation": one["value"], "answers": [one["value"]]} for one in asked]
    return [{"prompt": text[:cut], "continuation": text[cut:]}, *questions]


if __name__ == "__main__":
    sys.exit(main())

"""How well the scorers of the bundled model predict kvzip on held-out prompts, and what evicting by them costs.

``python benchmarks/scorers.py [--output benchmarks/results/scorers.json]``

The bundled model reads passages of books that neither it nor its scorers were trained on. ``rank`` is Spearman's
correlation of the scores of kvzap and of kvzip over the keys of a prompt, mean over prompts and heads; ``same_half`` is
the share of the half of a prompt's keys with the highest scores that both have. Perplexity is that of the second half
of each passage in the closed loop, after keys of the first half were evicted once, at its end; ``ratio`` is that over
the perplexity with the full cache. Intervals are 95 %, over passages.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from kvscope.closed_loop.compile import compile_perplexity
from kvscope.core.options import ModelSource, OutputOptions, PerplexityOptions, PlanOptions
from kvscope.gates.scorers import load_scorers
from kvscope.model.generate import trace
from kvscope.results.statistics import interval
from kvscope.training.scorers import pair, spearman

DATA = Path(__file__).parents[1] / "tests" / "data" / "demo_heldout.json"
POLICIES = ["kvzip", "kvzap", "h2o", "streaming-llm", "random"]
BUDGETS = ["50%", "25%", "10%"]
PROMPT = 190  # tokens, about half of a passage


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scorers.json"))
    args = parser.parse_args()
    found = load_scorers("demo").facts
    figures: dict[str, Any] = {"machine": machine(), "model": "demo", "scorers": found.provenance | {"traces": None}}
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, text in enumerate(json.loads(DATA.read_text())["passages"]):
            files.append(Path(folder) / f"{number}.txt")
            files[-1].write_text(text)
        figures |= {"passages": len(files), "layers": ranks(files, Path(folder) / "t")}
        figures["continued"] = perplexities(files, Path(folder) / "r")
    for row in (*figures["layers"], *figures["continued"]):
        print(json.dumps(row))
    args.output.write_text(json.dumps(figures, indent=1) + "\n")


def ranks(files: list[Path], path: Path) -> list[dict[str, Any]]:
    """Return for each layer how predicted and true scores of the prompts agree."""
    made = trace("demo", files, output=path, max_new_tokens=1, hidden=True, reread=True)
    scorers, rows = load_scorers("demo"), []
    for layer in made.layers:
        correlations, shared = [], []
        for sequence in made.sequences:
            hidden, target = pair(made, sequence.index, layer)
            for one, true in zip(scorers.scores(layer, hidden), target.T, strict=True):
                correlations.append(spearman(one, true))
                half = len(one) // 2
                both = set(one.topk(half).indices.tolist()) & set(true.topk(half).indices.tolist())
                shared.append(len(both) / half)
        rows.append(
            {
                "layer": layer,
                "rank": round(float(np.mean(correlations)), 3),
                "same_half": round(float(np.mean(shared)), 3),
            }
        )
    return rows


def perplexities(files: list[Path], path: Path) -> list[dict[str, Any]]:
    """Return the perplexity of what follows the prompts under each policy and budget."""
    options = PerplexityOptions(prompt=PROMPT, metrics=["retained_mass"], plan=PlanOptions(compress="prefill"))
    job = compile_perplexity(ModelSource("demo", dtype="float32"), files, POLICIES, BUDGETS, options)
    done, rows = job.execute(OutputOptions(path, False, None)), []
    for run in done.summary.runs:
        tokens = done.tokens(run.run)
        means = tokens.groupby("sequence")[["nll_policy", "nll_full"]].mean()
        cost = (means["nll_policy"] - means["nll_full"]).to_numpy()
        low, high = interval(cost)
        rows.append(
            {
                "policy": run.label,
                "budget": run.budget,
                "perplexity": round(float(np.exp(means["nll_policy"].mean())), 2),
                "ratio": round(float(np.exp(cost.mean())), 4),
                "interval": None if low is None or high is None else [round(float(np.exp(x)), 4) for x in (low, high)],
                "retained_mass": round(float(run.metrics["retained_mass"].mean or 0), 4),
            }
        )
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

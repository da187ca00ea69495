"""Perplexity and recall of every policy on held-out text, and which cheap metric predicts them.

``python benchmarks/outcomes.py [--questions 10] [--output benchmarks/results/outcomes.json]``

The bundled model reads passages of books that it was not trained on, and episodes in which a fact is stated and asked
for 64 to 512 tokens later. Both are recorded once and replayed under every policy at four budgets, in the open and the
closed loop, under both prefills: ``stream`` holds the cache to the budget from the first token on; ``full`` reads the
prompt (half of a passage, or all of an episode but the answer) with the full cache and evicts at its end. An answer is
right if every token of it is the model's first choice. Rank agreement is Spearman's correlation, over all pairs of
policy and budget, of each open-loop metric and its tails with the perplexity ratio of the passages and with the share
of right answers. For the latter, the metric is computed on the passages (``recall``) or on the questions
(``recall_of_its_own``).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from scipy.stats import spearmanr

import kvscope
from kvscope.core.options import ClosedLoopOptions, ModelSource, OutputOptions, Prefill, ReplayOptions
from kvscope.core.summary_records import RunSummary
from kvscope.model.loading import load
from kvscope.policies import POLICIES
from kvscope.replay.compile import compile_replay
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace

DATA = Path(__file__).parents[1] / "tests" / "data" / "demo_heldout.json"
BUDGETS = "10%,20%,40%,80%"
OUTCOMES = ("perplexity", "perplexity_full", "perplexity_ratio", "token_kl", "top1_agreement")
TAILS = ("share_below_half", "worst_step", "worst_head")
SHOWN = ("retained_mass", "late_mass_retained", "output_error", "ideal_cosine", "read_keys", "held_keys")


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=10, help="per distance")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--policies", nargs="*")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/outcomes.json"))
    args = parser.parse_args()
    data = json.loads(DATA.read_text())
    figures: dict[str, Any] = {"machine": machine(), "model": "demo", "budgets": BUDGETS}
    with tempfile.TemporaryDirectory() as folder:
        text = record(Path(folder), "text", halves(data["passages"][: args.passages]))
        asked = [one for one in data["recall"] if counted(one, data["recall"]) < args.questions]
        recall = record(Path(folder), "recall", [(one["prompt"], one["value"]) for one in asked])
        figures["tokens"] = {trace.name: sum(one.length for one in trace.sequences) for trace in (text, recall)}
        figures["questions"] = len(asked)
        for prefill in ("stream", "full"):
            made = [replayed(trace, prefill, Path(folder), args.policies) for trace in (text, recall)]
            figures[prefill] = compared(*made, [one["distance"] for one in asked])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps({prefill: figures[prefill]["rank_agreement"] for prefill in ("stream", "full")}, indent=1))


def counted(one: Mapping[str, Any], every: Sequence[Mapping[str, Any]]) -> int:
    """Return how many questions of the same distance come before this one."""
    same = [other for other in every if other["distance"] == one["distance"]]
    return next(place for place, other in enumerate(same) if other is one)


def halves(passages: Sequence[str]) -> list[tuple[str, str]]:
    """Return each passage in two parts, cut between words."""
    tokenizer = load(ModelSource("demo")).tokenizer
    parts = []
    for passage in passages:
        cut = passage.index(" ", len(passage) // 2)
        parts.append((passage[:cut], passage[cut:]))
        assert tokenizer(passage[cut:])["input_ids"], "a second half is not empty"
    return parts


def record(folder: Path, name: str, parts: Sequence[tuple[str, str]]) -> Trace:
    """Return a trace of prompts and their forced continuations."""
    prompts = folder / f"{name}.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": prompt, "continuation": after}) + "\n" for prompt, after in parts))
    return kvscope.trace("demo", [prompts], output=folder / name, store="maps+vectors")


def replayed(trace: Trace, prefill: Any, folder: Path, names: Sequence[str] | None) -> Replay:
    """Return every policy that this prefill allows, at all budgets, in both loops."""
    options = ReplayOptions(Prefill(prefill), closed=ClosedLoopOptions(), skip_unsupported=True)
    job = compile_replay(trace, names or POLICIES.names(), BUDGETS, options)
    for why in job.skipped.values():
        print("skipped:", why)
    print(f"{trace.name}, {prefill}: {len(job.plans)} policies", flush=True)
    return job.execute(OutputOptions(folder / f"{trace.name}-{prefill}"))


def compared(text: Replay, recall: Replay, distances: Sequence[int]) -> dict[str, Any]:
    """Return a row for each policy and budget, and the rank agreement over all rows."""
    rows, table = [], defaultdict(list)
    runs = {(run.label, run.budget): run for run in recall.summary.runs if run.loop == "closed"}
    opened, asked = ({run.run: run for run in replay.summary.runs if run.loop == "open"} for replay in (text, recall))
    for run in text.summary.runs:
        if run.loop != "closed":
            continue
        cheap = opened[run.open_run].metrics
        other = runs[run.label, run.budget]
        right, loss = answers(recall, other.run, distances)
        rows.append(
            {
                "policy": run.label,
                "budget": run.budget,
                "phase": run.phase,
                **{name: rounded(run.metrics[name].mean) for name in OUTCOMES},
                "low": rounded(run.metrics["perplexity_ratio"].low),
                "high": rounded(run.metrics["perplexity_ratio"].high),
                "held_overlap": rounded(run.gap.held_overlap),
                **{name: rounded(cheap[name].mean) for name in SHOWN},
                "answer_perplexity": rounded(np.exp(loss)),
                "recall": right,
            }
        )
        values, own = cheap_metrics(opened[run.open_run]), cheap_metrics(asked[other.open_run])
        if run.budget is not None and None not in (values["retained_mass"], values["ideal_cosine"]):
            for name in values.keys() & own.keys():
                table[name].append((values[name], own[name], run.metrics["perplexity_ratio"].mean, right["all"]))
    agreement = {}
    for name, found in sorted(table.items()):
        columns = np.array(found, float)
        of_text, of_recall, ratio, share = columns[np.isfinite(columns).all(1)].T
        agreement[name] = {
            "perplexity_ratio": rounded(spearmanr(of_text, ratio).statistic),
            "recall": rounded(spearmanr(of_text, share).statistic),
            "recall_of_its_own": rounded(spearmanr(of_recall, share).statistic),
            "pairs": len(ratio),
        }
    return {"rows": rows, "rank_agreement": agreement, "within_a_budget": within_a_budget(rows)}


def within_a_budget(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Return for each budget the rank agreement with both outcomes among its policies alone.

    Metrics are those on the passages.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in SHOWN:
        for budget in BUDGETS.split(","):
            own = [row for row in rows if row["budget"] == budget and row[name] is not None]
            if len(own) > 2:
                values = [row[name] for row in own]
                outcomes = {
                    "perplexity_ratio": [row["perplexity_ratio"] for row in own],
                    "recall": [row["recall"]["all"] for row in own],
                }
                agrees = {what: rounded(spearmanr(values, other).statistic) for what, other in outcomes.items()}
                found.setdefault(name, {})[budget] = agrees
    return found


def cheap_metrics(run: RunSummary) -> dict[str, float | None]:
    """Return every metric of an open run, and its tails as ``metric.tail``."""
    means = {name: value.mean for name, value in run.metrics.items()}
    tails = {f"{name}.{tail}": getattr(of, tail) for name, of in run.tails.items() for tail in TAILS}
    return {**means, **tails}


def answers(replay: Replay, run: int, distances: Sequence[int]) -> tuple[dict[str, float], float]:
    """Return the share of questions whose every answer token is right, by distance and in all, and the mean loss."""
    tokens = replay.tokens(run)
    prompts = [one.prompt for one in replay.info.trace.sequences]
    tokens = tokens[tokens["position"] >= tokens["sequence"].map(dict(enumerate(prompts)))]
    right = tokens.groupby("sequence")["top1_correct"].all().reindex(range(len(distances))).to_numpy(bool)
    shares = {str(d): rounded(right[np.array(distances) == d].mean()) for d in sorted(set(distances))}
    return {**shares, "all": rounded(right.mean())}, float(tokens["nll_policy"].mean())


def rounded(value: float | None) -> float | None:
    """Return a number with few digits, so that the file stays small."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.5g}")


if __name__ == "__main__":
    main()

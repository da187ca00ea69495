"""Perplexity and recall with gates on held-out text, compared with policies that hold as many keys on average.

``python benchmarks/gates.py GATE... [--questions 10] [--output benchmarks/results/gates.json]``

The bundled model reads passages of books that it was not trained on. In ``text``, keys are evicted from the first token
on. In ``continued``, the first half is a prompt that is read with the full cache; keys are evicted once, at its end,
and all later keys are retained, as published. In ``recall``, the model reads episodes in which a fact is stated and
asked for 64 to 512 tokens later; keys are evicted once, at the end of the prompt, which ends with the question. A gate
decides how many keys it retains. Every other policy gets the budget at which it holds as many, on average over steps,
layers and heads; ``full`` evicts nothing. ``keep`` is the share of the keys before the eviction that are held. An
answer is right if every token of it is the model's first choice. Intervals are 95 %, over passages and over questions.
``than_gate`` is a policy's mean loss, or share of right answers, minus that of the gate, with its interval, and p is
from an exact sign test of the two.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from numpy.typing import NDArray

from kvscope.closed_loop.compile import evaluate
from kvscope.closed_loop.passage import Passage
from kvscope.core.budget import Budget
from kvscope.core.options import ModelSource, Prefill
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec
from kvscope.gates.module import load_gate
from kvscope.metrics import METRICS
from kvscope.model.loading import Loaded, load
from kvscope.model.token_ids import TextEncoder
from kvscope.policies.spec import parse_policy
from kvscope.results.statistics import interval, paired
from kvscope.trace.reader import TokenSequence

DATA = Path(__file__).parents[1] / "tests" / "data" / "demo_heldout.json"
Spec = tuple[str, int | None]  # a policy, and its budget in thousandths
OTHERS = ("h2o", "streaming-llm", "tova", "a2sf")
Array = NDArray[np.float64]


class Kept:
    """A result sink that collects losses, right answers and held keys, by run and sequence."""

    def __init__(self) -> None:
        self.tokens_of: dict[tuple[int, int], Mapping[str, NDArray[Any]]] = {}
        self.held: dict[tuple[int, int], list[float]] = defaultdict(list)  # of each layer

    def residency(self, *_: Any, **__: Any) -> None:
        """Discard residency intervals."""

    def fidelity(self, run: int, sequence: int, layer: int, steps: Any, values: Mapping[str, NDArray[Any]]) -> None:
        """Collect the mean number of keys held in a layer."""
        self.held[run, sequence].append(float(np.nanmean(values["held_keys"])))

    def tokens(self, run: int, sequence: int, position: Any, values: Mapping[str, NDArray[Any]]) -> None:
        """Collect the losses and first choices of the tokens."""
        self.tokens_of[run, sequence] = values

    def mean(self, run: int, name: str) -> Array:
        """Return the mean of a value over the tokens of each sequence."""
        return np.array([float(values[name].mean()) for (own, _), values in self.tokens_of.items() if own == run])

    def right(self, run: int) -> Array:
        """Return for each sequence whether all of its tokens were the first choice."""
        return np.array([float(values["top1_correct"].all()) for (r, _), values in self.tokens_of.items() if r == run])

    def held_keys(self, run: int) -> float:
        """Return the keys held, mean over sequences and layers."""
        return float(np.mean([layers for (own, _), layers in self.held.items() if own == run]))


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gates", nargs="+")
    parser.add_argument("--questions", type=int, default=20, help="per distance")
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gates.json"))
    args = parser.parse_args()
    data, loaded = json.loads(DATA.read_text()), load(ModelSource("demo"))
    whole = [passage(loaded, n, text, "") for n, text in enumerate(data["passages"][: args.passages])]
    halves = [replace(one, sequence=replace(one.sequence, prompt=one.sequence.length // 2)) for one in whole]
    asked = [one for d in (64, 128, 256, 512) for one in of_distance(data["recall"], d)[: args.questions]]
    questions = [passage(loaded, n, one["prompt"], one["value"]) for n, one in enumerate(asked)]
    figures: dict[str, Any] = {"machine": machine(), "model": "demo", "questions": len(asked), "gates": []}
    for name in args.gates:
        facts, gate = load_gate(name).facts, f"attention-gate:gate={name}"
        entry: dict[str, Any] = {"gate": Path(name).name, "form": facts.form, "training": facts.provenance}
        if facts.form == "causal":
            entry["text"] = text_rows(loaded, whole, "stream", f"{gate},decode=true")
        entry["continued"] = text_rows(loaded, halves, "full", gate)
        entry["recall"] = recall_rows(loaded, questions, gate, [one["distance"] for one in asked])
        figures["gates"].append(entry)
        shown = {key: entry[key] for key in ("text", "continued", "recall") if key in entry}
        print(entry["gate"], *(json.dumps(row) for table in shown.values() for row in table), sep="\n", flush=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")


def of_distance(questions: Sequence[Mapping[str, Any]], distance: int) -> list[Mapping[str, Any]]:
    """Return the questions of one distance."""
    return [one for one in questions if one["distance"] == distance]


def passage(loaded: Loaded, number: int, prompt: str, value: str) -> Passage:
    """Return a passage whose tokens after the prompt are scored; without a prompt, all but the first token are."""
    encoder = TextEncoder(loaded.tokenizer)
    first, rest = encoder.split(prompt, value)
    first = [*encoder.prefix, *first]
    return Passage(TokenSequence(number, len(first) if rest else 1, len(first) + len(rest)), torch.tensor(first + rest))


def measured(
    loaded: Loaded, texts: Sequence[Passage], prefill: Prefill, specs: Sequence[tuple[str, int | None]]
) -> Kept:
    """Return the results of passages under policies with budgets in thousandths, in the closed loop."""
    cut = "prefill" if prefill == "full" else None
    runs = []
    for number, (spec, share) in enumerate(specs):
        plan = EvictionPlan.make(parse_policy(spec), compress=None if share is None else cut)
        runs.append(RunSpec(number, plan, None if share is None else Budget.parse(f"{share / 10}%"), "closed"))
    kept = Kept()
    evaluate(loaded.model, texts, runs, [METRICS.get("held_keys")], prefill, kept)
    return kept


def rows(loaded: Loaded, texts: Sequence[Passage], prefill: Prefill, gate: str) -> tuple[Kept, list[Spec]]:
    """Return the results of passages under a gate, and under policies that hold as many keys."""
    held = measured(loaded, texts, prefill, [(gate, None)]).held_keys(0)
    share = min(range(1, 1001), key=lambda share: abs(mean_held(texts, prefill, share) - held))
    specs: list[Spec] = [(gate, None), ("full", None), *((name, share) for name in OTHERS)]
    return measured(loaded, texts, prefill, specs), specs


def mean_held(texts: Sequence[Passage], prefill: Prefill, share: int) -> float:
    """Return the keys held under a budget in thousandths, mean over the steps after the first eviction."""
    means = []
    for prompt, length in ((one.sequence.prompt, one.sequence.length) for one in texts):
        if prefill == "full":
            held = -(-prompt * share // 1000) + 1 + np.arange(length - prompt)
        else:
            held = np.minimum(np.arange(length) + 1, -(-length * share // 1000))
        means.append(held.mean())
    return float(np.mean(means))


def text_rows(loaded: Loaded, passages: Sequence[Passage], prefill: Prefill, gate: str) -> list[dict[str, Any]]:
    """Return perplexities of passages, and how that of each other policy compares with the gate's."""
    kept, specs = rows(loaded, passages, prefill, gate)
    own, found = kept.mean(0, "nll_policy"), []
    for number, (spec, share) in enumerate(specs):
        cost = kept.mean(number, "nll_policy") - kept.mean(number, "nll_full")
        low, high = interval(cost)
        found.append(
            {
                **described(kept, number, spec, share, passages, prefill),
                "perplexity": round(float(np.exp(kept.mean(number, "nll_policy").mean())), 2),
                "perplexity_full": round(float(np.exp(kept.mean(number, "nll_full").mean())), 2),
                "ratio": round(float(np.exp(cost.mean())), 4),
                "interval": None if low is None or high is None else rounded(np.exp(low), np.exp(high)),
                **beside(own, kept.mean(number, "nll_policy")),
            }
        )
    return found


def described(
    kept: Kept, number: int, spec: str, share: int | None, texts: Sequence[Passage], prefill: Prefill
) -> dict[str, Any]:
    """Return policy and budget of a run, the keys that it held, and their share of the keys that could be evicted."""
    none, every = (mean_held(texts, prefill, share) for share in (0, 1000))
    held = kept.held_keys(number)
    return {
        "policy": spec.partition(":")[0],
        "budget": None if share is None else f"{share / 10}%",
        "held_keys": round(held, 1),
        "keep": round((held - none) / (every - none), 3),
    }


def beside(gate: Array, other: Array) -> dict[str, Any]:
    """Return how a policy compares with the gate on the same sequences."""
    found = paired(gate.tolist(), other.tolist())
    assert found.difference is not None
    return {
        "than_gate": round(found.difference, 4),
        "than_gate_interval": rounded(found.low, found.high),
        "p": round(found.p, 4),
    }


def rounded(low: float | None, high: float | None) -> list[float] | None:
    """Return an interval with four digits, or None for too few sequences."""
    return None if low is None or high is None else [round(float(low), 4), round(float(high), 4)]


def recall_rows(
    loaded: Loaded, questions: Sequence[Passage], gate: str, distances: Sequence[int]
) -> list[dict[str, Any]]:
    """Return the shares of right answers, in all and by distance, and how others compare with the gate."""
    kept, specs = rows(loaded, questions, "full", gate)
    found = []
    for number, (spec, share) in enumerate(specs):
        right = kept.right(number)
        low, high = interval(right)
        found.append(
            {
                **described(kept, number, spec, share, questions, "full"),
                "recall": round(float(right.mean()), 3),
                "interval": rounded(low, high),
                "by_distance": {
                    str(d): round(float(right[np.array(distances) == d].mean()), 3) for d in sorted(set(distances))
                },
                **beside(kept.right(0), right),
            }
        )
    return found


if __name__ == "__main__":
    main()

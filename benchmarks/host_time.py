"""Processor time of the thread that runs the model, where computing costs next to nothing: what a GPU waits for.

``python benchmarks/host_time.py [--tokens 64] [--rounds 15] [--output benchmarks/results/host_time.json]``

The model has the 32 layers of Llama-2-7B and tiny matrices, so that nearly all of its time is Python and the start of
operations. Measured are the closed loop beside one forward pass, and a decoded token that is traced, or decoded under a
policy, beside a plain one. Everything is measured in turn in one process, and each ratio is of one round. Other work on
the machine makes both longer: the ratios count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from closed_loop import EIGHT, closed, generate, plans, real
from machine import machine
from shapes import random_loaded
from trace_cost import action

from kvscope.core.budget import parse_budgets
from kvscope.core.options import Loop
from kvscope.engine.runs import runs_of

NEW = 32  # decoded tokens


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/host_time.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = {"machine": machine(), "tokens": args.tokens, "rounds": args.rounds}
    figures |= ratios(measured(args.tokens, args.rounds))
    print(json.dumps(figures, indent=1))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")


def measured(tokens: int, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each kind of work in each round, after a warm-up."""
    loaded = random_loaded("thin", "cpu")
    model = loaded.model
    ids = torch.randint(3, 64, (tokens,), generator=torch.Generator().manual_seed(0))
    one, eight = (
        runs_of(plans(names), parse_budgets(budgets), Loop.closed)
        for names, budgets in ((["h2o"], "20%"), (EIGHT, "20%,40%"))
    )
    work: dict[str, Callable[[], object]] = {
        "forward": partial(forward, model, ids),
        "closed": partial(closed, model, ids, one),
        "closed_eight": partial(closed, model, ids, eight),
        "plain": partial(action("plain", loaded), 8, NEW),
        "maps": partial(action("maps", loaded), 8, NEW),
        "qkv": partial(action("qkv", loaded), 8, NEW),
        "generate": partial(generate, model, ids[:NEW]),
        "decoding": partial(real, model, ids[:NEW], one[0]),
    }
    took: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, run in work.items():
            start = time.thread_time()
            run()
            took[name].append(time.thread_time() - start)
    return {name: seconds[1:] for name, seconds in took.items()}


def ratios(took: dict[str, list[float]]) -> dict[str, Any]:
    """Return medians in seconds, and of the ratios to what each kind of work stands beside, with their range."""
    beside = {"closed": "forward", "closed_eight": "closed", "maps": "plain", "qkv": "plain", "decoding": "generate"}
    figures: dict[str, Any] = {"seconds": {name: round(statistics.median(own), 4) for name, own in took.items()}}
    for name, other in beside.items():
        each = sorted(one / two for one, two in zip(took[name], took[other], strict=True))
        figures[f"{name}_over_{other}"] = {
            "median": round(statistics.median(each), 2),
            "range": [round(each[0], 2), round(each[-1], 2)],
        }
    return figures


@torch.inference_mode()
def forward(model: Any, ids: torch.Tensor) -> None:
    """Run one forward pass without a cache."""
    model(input_ids=ids[None], use_cache=False)


if __name__ == "__main__":
    main()

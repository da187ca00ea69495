"""The cost of more policies and budgets in one replay: seconds of many runs compared with one.

``python benchmarks/replay_runs.py [--policies 25] [--runs 3] [--output benchmarks/results/replay_runs.json]``

The bundled model's demo prompt is recorded once. Then one policy at one budget, and many policies at three budgets, are
replayed in turn in one process. Figures are medians, and the ratio is computed round by round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

import kvscope
from kvscope.core.options import ReplayOptions
from kvscope.model.names import demo_folder
from kvscope.policies import POLICIES
from kvscope.policies.spec import parse_policies
from kvscope.replay.compile import compile_replay
from kvscope.trace.reader import Trace

BUDGETS = "10%,20%,40%"


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", type=int, default=25)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--one", default="h2o")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/replay_runs.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = kvscope.trace(
            "demo", [demo_folder() / "prompt.txt"], output=Path(folder) / "trace", store="maps+vectors"
        )
        figures = measured(trace, Path(folder), args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def measured(trace: Trace, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the figures."""
    every = [policy for policy in parse_policies(POLICIES.names()) if not getattr(policy.traits, "clairvoyant", False)]
    job = compile_replay(trace, every, BUDGETS, ReplayOptions(skip_unsupported=True))
    many = [plan.policy for plan in job.plans][: args.policies]
    one, all_ = [], []
    seconds(trace, [args.one], "20%", folder / "first")  # compiles and loads the kernels
    for number in range(args.runs):
        one.append(seconds(trace, [args.one], "20%", folder / f"one-{number}"))
        all_.append(seconds(trace, many, BUDGETS, folder / f"all-{number}"))
    ratios = [a / b for a, b in zip(all_, one, strict=True)]
    return {
        "machine": machine(),
        "trace": {"tokens": trace.sequences[0].length, "layers": len(trace.layers), "heads": trace.heads},
        "one": f"{args.one} at 20%",
        "many": [policy.name for policy in many],
        "budgets": BUDGETS,
        "seconds": {"one": summary(one), "many": summary(all_)},
        "ratio": summary(ratios),
    }


def seconds(trace: Trace, policies: Any, budgets: str, output: Path) -> float:
    """Return the seconds of a replay with all metrics, including its files."""
    start = time.perf_counter()
    kvscope.replay(trace, policies, budgets, output=output)
    return time.perf_counter() - start


def summary(values: list[float]) -> dict[str, Any]:
    """Return the median and the range."""
    return {"median": round(statistics.median(values), 3), "range": [round(min(values), 3), round(max(values), 3)]}


if __name__ == "__main__":
    main()

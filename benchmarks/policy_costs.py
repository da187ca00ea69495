"""What each policy costs on a CPU: the time of a replay of one budget, compared with that of h2o.

``python benchmarks/policy_costs.py [--runs 5] [--policy NAME]... [--output benchmarks/results/policy_costs.json]``

The bundled model reads 512 tokens of books that it was not trained on; its trace holds every signal. `indexer` needs a
model with an index, so it and its `h2o` are replayed over a trace of a small random DeepSeek-V3.2. Each policy is
replayed at a budget of 20 %, with retained mass as the only metric, in turn with `h2o`, in one process. A figure is the
median over rounds of the ratio in one round, reading of the trace included. With ``--policy`` only those are measured
anew, and the other figures of the file are kept; a figure of another machine or model names it.
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
from replay_speed import record

import kvscope
from kvscope.policies.describe import describe
from kvscope.trace.reader import Trace
from tests.models.build import saved

TOKENS, BUDGET, BASE = 512, "20%", "h2o"
OTHER_MODELS = {"indexer": "deepseek_v32"}  # policy: type of a random model that has what the policy needs


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--policy", action="append")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/policy_costs.json"))
    args = parser.parse_args()
    before = json.loads(args.output.read_text()) if args.policy and args.output.exists() else {}
    here = machine()
    usual = before.get("machine", here)
    with tempfile.TemporaryDirectory() as folder:
        trace = record(TOKENS, Path(folder), "maps+vectors", outputs=True, reread=True)
        names = args.policy or [row["name"] for row in describe()]
        measured = {
            name: cost_with(OTHER_MODELS[name], name, args.runs, Path(folder))
            if name in OTHER_MODELS
            else cost(trace, name, args.runs, Path(folder))
            for name in names
        }
    if usual != here:
        measured = {name: found | {"machine": here} for name, found in measured.items()}
    policies = {**before.get("policies", {}), **measured}
    figures = {
        "how": f"time of a replay at {BUDGET}, divided by that of {BASE} in the same round; median and range",
        "machine": usual,
        "trace": {"tokens": trace.sequences[0].length, "layers": len(trace.layers), "heads": trace.heads},
        "policies": {name: policies[name] for name in sorted(policies)},
    }
    args.output.write_text(json.dumps(figures, indent=1) + "\n")


def cost(trace: Trace, name: str, runs: int, folder: Path) -> dict[str, Any]:
    """Return what a policy costs."""
    ratios: list[float] = []
    for lap in range(runs + 1):
        took = seconds(trace, name, folder)
        if lap:  # the first round compiles
            ratios.append(took / seconds(trace, BASE, folder))
    ratios.sort()
    found = {"of_h2o": round(statistics.median(ratios), 2), "range": [round(ratios[0], 2), round(ratios[-1], 2)]}
    print(name, found, flush=True)
    return found


def cost_with(model: str, name: str, runs: int, folder: Path) -> dict[str, Any]:
    """Return what a policy costs over as long a trace of a small random model of a type."""
    prompt = folder / f"{model}.txt"
    prompt.write_text(" ".join(f"w{(7 * number) % 101 + 3}" for number in range(TOKENS - 32)))
    source = saved(folder / model, model)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": TOKENS}))
    trace = kvscope.trace(str(source), [prompt], output=folder / f"trace-{model}", store="maps", max_new_tokens=32)
    return cost(trace, name, runs, folder) | {"model": f"random {model}", "tokens": trace.sequences[0].length}


def seconds(trace: Trace, name: str, folder: Path) -> float:
    """Return how long a replay of a policy takes."""
    begin = time.perf_counter()
    kvscope.replay(trace, [name], BUDGET, output=folder / "out", metrics=["retained_mass"], force=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()

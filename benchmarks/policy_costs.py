"""What each policy costs on a CPU: the time of a replay of one budget, compared with that of h2o.

``python benchmarks/policy_costs.py [--runs 5] [--policy NAME]... [--output benchmarks/results/policy_costs.json]``

The bundled model reads 512 tokens of books that it was not trained on; its trace holds maps and vectors. Each policy is
replayed at a budget of 20 %, with retained mass as the only metric, in turn with `h2o`, in one process. A figure is the
median over rounds of the ratio in one round, reading of the trace included. With ``--policy`` only those are measured
anew, and the other figures of the file are kept; a figure that another machine measured names it.
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
from kvscope.core.errors import KvscopeError
from kvscope.policies.describe import describe
from kvscope.trace.reader import Trace

TOKENS, BUDGET, BASE = 512, "20%", "h2o"


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
        trace = record(TOKENS, Path(folder), "maps+vectors")
        names = args.policy or [row["name"] for row in describe()]
        measured = {name: cost(trace, name, args.runs, Path(folder)) for name in names}
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
    """Return what a policy costs, or why it cannot be replayed over this trace."""
    ratios: list[float] = []
    for lap in range(runs + 1):
        try:
            took = seconds(trace, name, folder)
        except KvscopeError as error:
            print(name, error, flush=True)
            return {"not_replayed": str(error)}
        if lap:  # the first round compiles
            ratios.append(took / seconds(trace, BASE, folder))
    ratios.sort()
    found = {"of_h2o": round(statistics.median(ratios), 2), "range": [round(ratios[0], 2), round(ratios[-1], 2)]}
    print(name, found, flush=True)
    return found


def seconds(trace: Trace, name: str, folder: Path) -> float:
    """Return how long a replay of a policy takes."""
    begin = time.perf_counter()
    kvscope.replay(trace, [name], BUDGET, output=folder / "out", metrics=["retained_mass"], force=True)
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()

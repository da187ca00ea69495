"""The time of ``kvscope --help`` and of a completion, in processor time of the whole process.

``python benchmarks/help.py [--rounds 9] [--output benchmarks/results/help.json]``

Processor time does not grow with the waiting of a busy machine, as the clock on the wall does. The least of the rounds
is that with the fewest disturbances.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from machine import machine

COMPLETION = {"_KVSCOPE_COMPLETE": "complete_bash", "COMP_WORDS": "kvscope replay --policy h", "COMP_CWORD": "3"}
TIMED: dict[str, tuple[list[str], dict[str, str]]] = {
    "python": (["-c", "pass"], {}),
    "help": (["-m", "kvscope", "--help"], {}),
    "help_of_trace": (["-m", "kvscope", "trace", "--help"], {}),
    "completion": (["-m", "kvscope"], COMPLETION),
}


def main() -> None:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/help.json"))
    args = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine(), "rounds": args.rounds, "processor_seconds": {}}
    for name, (arguments, more) in TIMED.items():
        found = [processor_seconds(arguments, more) for _ in range(args.rounds)]
        figures["processor_seconds"][name] = {
            "least": round(min(found), 3),
            "median": round(statistics.median(found), 3),
        }
    print(json.dumps(figures, indent=1), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(figures, indent=1) + "\n")


def processor_seconds(arguments: list[str], more: dict[str, str]) -> float:
    """Return the processor time of one process of this Python, user and system together, in seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True, env={**os.environ, **more})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()

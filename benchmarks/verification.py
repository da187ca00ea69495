"""What comparing checksums costs a replay: processor and wall time with and without ``--no-verify``, by turns.

python benchmarks/verification.py [--tokens N] [--times N] [--out FILE]

A trace of the bundled model is recorded, and replayed by one policy under one budget, the cheapest replay there is, so
that the share is the largest that occurs. Both ways alternate in one process; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kvscope.cli.app import run  # noqa: E402


def record(folder: Path, tokens: int) -> Path:
    """Record a prompt of about `tokens` tokens, and return the trace."""
    text = (ROOT / "traces" / "example.txt").read_text(encoding="utf-8")
    (folder / "prompt.txt").write_text((text * 40)[: 3 * tokens], encoding="utf-8")
    trace = folder / "trace"
    if run(["trace", "--model", "demo", str(folder / "prompt.txt"), "--max-new-tokens", "8", "-o", str(trace), "-q"]):
        raise SystemExit("the trace cannot be recorded")
    return trace


def measure(trace: Path, output: Path, times: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of each replay with and without verification, after one that is not counted."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"processor": [], "wall": []} for name in ("verified", "unverified")
    }
    base = ["replay", str(trace), "-p", "tova", "--budget", "20%", "-o", str(output), "--force", "-q"]
    for number in range(-1, times):
        for name, more in (("verified", []), ("unverified", ["--no-verify"])):
            began = time.process_time(), time.perf_counter()
            if run([*base, *more]):
                raise SystemExit("the replay fails")
            if number >= 0:
                found[name]["processor"].append(time.process_time() - began[0])
                found[name]["wall"].append(time.perf_counter() - began[1])
    return found


def main() -> None:
    """Measure, and print or write medians and the share of verification."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = record(Path(folder), given.tokens)
        size = sum(file.stat().st_size for file in trace.rglob("*") if file.is_file())
        found = measure(trace, Path(folder) / "replay", given.times)
    medians = {way: {clock: statistics.median(each) for clock, each in clocks.items()} for way, clocks in found.items()}
    cost = {clock: medians["verified"][clock] / medians["unverified"][clock] - 1 for clock in ("processor", "wall")}
    about = {"bytes": size, "times": given.times, "seconds": medians, "cost": cost}
    print(json.dumps(about, indent=1))
    if given.out:
        given.out.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

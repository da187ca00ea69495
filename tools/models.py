"""Probe every type of model that the installed transformers knows, each in a process of its own with a time limit.

python tools/models.py [TYPE ...]       print what happens to these types, or to all
python tools/models.py --write          the same, and write the table kvscope/model/types.json from it
python tools/models.py --check          the same, and end with status 1 if something differs from the table

Each type is built from a tiny configuration, traced, compared with eager attention, replayed in the open and the closed
loop and verified. With --results FILE the measurements are kept there, and types that it has already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.models.build import TYPES
from tests.models.probe import probe, record_of

TABLE = Path(__file__).parent.parent / "kvscope" / "model" / "types.json"
MEMORY = 8 << 30  # bytes of a process
SECONDS = 120


def probed(name: str) -> dict[str, object]:
    """Return the result of one type, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        child = os.fork()
        if child == 0:
            _child(name, Path(folder), result)
        _, status = os.waitpid(child, 0)
        if not result.is_file():
            crash = {"trace": "crash", "message": f"the process ended with status {status} within {SECONDS} s"}
            return {**dict.fromkeys(("replay", "closed", "verify"), "-"), **crash}
        return dict(json.loads(result.read_text()))


def _child(name: str, folder: Path, result: Path) -> None:
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        result.write_text(json.dumps(probe(name, folder)))
    finally:
        os._exit(0)


def main() -> int:
    """Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    chosen = parser.parse_args()
    kept = json.loads(chosen.results.read_text()) if chosen.results and chosen.results.is_file() else {}
    table = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    wrong = []
    for name in chosen.types or TYPES:
        started = time.monotonic()
        if name not in kept:
            kept[name] = probed(name)
            if chosen.results:
                chosen.results.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        record = record_of(kept[name])
        print(f"{name} ({time.monotonic() - started:.0f} s): {json.dumps(record)}", flush=True)
        wrong += [f"{name}: {table.get(name)} in the table, now {record}"] * (table.get(name) != record)
        table[name] = record
    if chosen.write:
        TABLE.write_text(json.dumps({name: table[name] for name in sorted(table)}, indent=1) + "\n")
    if chosen.check:
        print("\n".join(wrong) or "as in the table")
    return 1 if chosen.check and wrong else 0


if __name__ == "__main__":
    sys.exit(main())

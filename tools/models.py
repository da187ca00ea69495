"""Probe every type of model that the installed transformers knows, each in a process of its own with a time limit.

    python tools/models.py --output FILE [TYPE ...]

Each type is built from a tiny configuration, traced, compared with eager attention, replayed in the open and the closed
loop and verified. Results are added to FILE, one per type; types that it has already are skipped unless they are named.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.models.build import TYPES
from tests.models.probe import probe

MEMORY = 8 << 30


def probed(name: str, seconds: int) -> dict[str, object]:
    """Return the result of one type, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        child = os.fork()
        if child == 0:
            _child(name, Path(folder), result, seconds)
        _, status = os.waitpid(child, 0)
        if not result.is_file():
            return {"trace": "crash", "message": f"the process ended with status {status} within {seconds} s"}
        return dict(json.loads(result.read_text()))


def _child(name: str, folder: Path, result: Path, seconds: int) -> None:
    import resource

    signal.alarm(seconds)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        result.write_text(json.dumps(probe(name, folder)))
    finally:
        os._exit(0)


def main() -> None:
    """Probe the types of the command line, or all that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=90)
    chosen = parser.parse_args()
    results = json.loads(chosen.output.read_text()) if chosen.output.is_file() else {}
    for name in chosen.types or [name for name in TYPES if name not in results]:
        started = time.monotonic()
        results[name] = probed(name, chosen.seconds)
        chosen.output.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        shown = {key: value for key, value in results[name].items() if value not in (None, "")}
        print(f"{name} ({time.monotonic() - started:.0f} s): {json.dumps(shown)}", flush=True)


if __name__ == "__main__":
    main()

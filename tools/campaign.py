"""Damage traces and replays in thousands of ways, and look whether anything damaged is accepted.

python tools/campaign.py [--cases N] [--seed S] [--seconds S] [--output FILE]

Every case copies a folder, damages it (tools/mutations.py), reads everything in it, and is one of

    refused                             an error of two lines
    same result                         accepted, and what is read is what was read before
    WRONG: accepted with another result
    traceback                           any other exception
    hang                                no end after 20 seconds
    abort                               the process ended

The last four make the exit status 1. The cases run in one other process, which is started again where it ended; case
number N of a seed is always the same, so that one can be repeated alone: --only N.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kvscope.core.errors import KvscopeError  # noqa: E402
from kvscope.core.json_records import plain  # noqa: E402
from kvscope.results.store import open_replay  # noqa: E402
from kvscope.results.stream import means  # noqa: E402
from kvscope.trace.reader import open_trace  # noqa: E402
from tools.campaign_subjects import make_subjects  # noqa: E402
from tools.mutations import MUTATIONS, WEIGHTS, Subject, copied  # noqa: E402

LIMIT = 20.0  # seconds of a case
BAD = ("WRONG: accepted with another result", "traceback", "hang", "abort")
OUTCOMES = ("refused", "same result", *BAD)


@dataclass(frozen=True)
class Case:
    """What was done in one case, and what came of it."""

    number: int
    subject: str
    mutation: str
    done: str
    outcome: str = ""
    said: str = ""


def read_trace(path: Path) -> str:
    """Return a digest of everything that can be read from a trace, and of what decides in its header."""
    trace = open_trace(path)
    whole = hashlib.sha256(repr((trace.sequences, sorted(trace.stored), trace.layers)).encode())
    facts = plain(trace.header)
    longest = max(item.length for item in trace.sequences)
    windows = [longest if window is None else min(longest, window) for window in trace.header.sliding_window]
    whole.update(repr(windows).encode())
    for name in ("heads", "kv_heads", "attention"):
        whole.update(repr(facts[name]).encode())
    whole.update(trace.tokens().to_csv().encode())
    for sequence in range(len(trace.sequences)):
        for layer in trace.layers:
            for array in signals(trace, sequence, layer):
                whole.update(np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


def signals(trace: Any, sequence: int, layer: int) -> list[Any]:
    """Return every array of one layer that a trace has."""
    stored = trace.stored
    read = {
        "maps": [trace.attention, trace.row_sums],
        "value_l1": [trace.value_norms],
        "value_l2": [lambda number, layer: trace.value_norms(number, layer, "l2")],
        "key_l2": [trace.key_norms],
        "similarity": [trace.similarity],
        "queries": [trace.mean_queries],
        "hidden": [trace.hidden],
        "topk": [trace.residuals],
    }
    found = [call(sequence, layer) for name, calls in read.items() if name in stored for call in calls]
    which = [name.partition(":")[2] for name in sorted(stored) if name.startswith("vectors:")]
    return found + [trace.vectors(sequence, layer, name) for name in which]


def read_replay(path: Path) -> str:
    """Return a digest of everything that a report reads from a replay."""
    replay = open_replay(path)
    whole = hashlib.sha256(json.dumps(plain(replay.summary), sort_keys=True).encode())
    for frame in (replay.residency(), replay.fidelity(), replay.tokens(), replay.answers()):
        whole.update(frame.to_csv(float_format="%.6g").encode())
    found = means(replay)
    for run in replay.info.runs:
        for metric in list(replay.info.metrics)[:2]:
            whole.update(repr(sorted(found.of(run.run, metric, "layer").items())).encode())
    return whole.hexdigest()


READERS = {"trace.json": read_trace, "run.json": read_replay}


def run_case(number: int, seed: int, known: dict[str, Subject], expected: dict[str, str], work: Path) -> Case:
    """Run one case."""
    draw = random.Random(f"{seed} {number}")
    name = draw.choice(sorted(known))
    subject = known[name]
    mutation = draw.choices(MUTATIONS, WEIGHTS)[0]
    shutil.rmtree(work, ignore_errors=True)
    copied(subject, work)
    case = Case(number, name, mutation.__name__, mutation(draw, subject, work))
    try:
        digest = READERS[subject.header](work)
    except KvscopeError as error:
        lines = str(error).splitlines()
        two = len(lines) == 2 and all(lines) and error.exit_status == 1
        return replace(case, outcome="refused" if two else "traceback", said=str(error))
    except BaseException:
        return replace(case, outcome="traceback", said=traceback.format_exc(limit=-4))
    return replace(case, outcome="same result" if digest == expected[name] else BAD[0])


def work_on(pipe: multiprocessing.connection.Connection, seed: int, folder: Path, ram: Path) -> None:
    """Run the cases whose numbers come through a pipe; runs in the other process."""
    known = make_subjects(folder, ROOT)
    expected = {name: READERS[subject.header](subject.source) for name, subject in known.items()}
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        pipe.send(run_case(number, seed, known, expected, ram / "case"))


class Worker:
    """The process that runs cases; started again after one that hangs or aborts."""

    def __init__(self, seed: int, folder: Path, ram: Path) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._arguments = (seed, folder, ram)
        self._start()

    def _start(self) -> None:
        self._pipe, other = self._context.Pipe()
        self._process = self._context.Process(target=work_on, args=(other, *self._arguments), daemon=True)
        self._process.start()
        other.close()
        self._pipe.recv()

    def run(self, number: int) -> Case:
        """Return one case; one that hangs or aborts has no description but its number."""
        self._pipe.send(number)
        outcome = "abort"
        try:
            if self._pipe.poll(LIMIT):
                found: Case = self._pipe.recv()
                return found
            outcome = "hang"
        except EOFError:
            pass
        self._process.kill()
        self._process.join()
        said = f"exit status {self._process.exitcode}"
        self._start()
        return Case(number, "?", "?", "?", outcome, said)

    def stop(self) -> None:
        """End the process."""
        self._pipe.send(None)
        self._process.join()


def campaign(cases: int, seed: int, seconds: float = float("inf"), first: int = 0) -> list[Case]:
    """Return the outcome of up to `cases` cases, of those that are done after `seconds`."""
    fast = Path("/dev/shm")
    found: list[Case] = []
    started = time.monotonic()
    where = fast if os.access(fast, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where, prefix="kvscope-campaign-") as ram:
        folder = Path(ram) / "subjects"
        make_subjects(folder, ROOT)
        worker = Worker(seed, folder, Path(ram))
        for number in range(first, first + cases):
            found.append(worker.run(number))
            if time.monotonic() - started > seconds:
                break
        worker.stop()
    return found


def table(found: list[Case]) -> dict[str, dict[str, int]]:
    """Return how many cases of each mutation had each outcome."""
    counts = Counter((case.mutation, case.outcome) for case in found)
    names = sorted({case.mutation for case in found})
    return {name: {outcome: counts[name, outcome] for outcome in OUTCOMES if counts[name, outcome]} for name in names}


def main() -> int:
    """Run a campaign; returns 1 if a damaged folder was accepted, or ended in anything but two lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this many seconds")
    parser.add_argument("--only", type=int, help="number of a single case to run, with all that it says")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    started = time.monotonic()
    found = campaign(1 if given.only is not None else given.cases, given.seed, given.seconds, given.only or 0)
    seconds = time.monotonic() - started
    totals = Counter(case.outcome for case in found)
    for case in found:
        if case.outcome in BAD or given.only is not None:
            print(f"case {case.number}: {case.outcome}: {case.subject}: {case.mutation}: {case.done}\n{case.said}")
    for name, counts in table(found).items():
        print(f"{name:12} " + ", ".join(f"{outcome} {count}" for outcome, count in counts.items()))
    print(f"{len(found)} cases in {seconds:.0f} s: " + ", ".join(f"{name} {totals[name]}" for name in OUTCOMES))
    if given.output:
        figures = {
            "seed": given.seed,
            "cases": len(found),
            "seconds": round(seconds, 1),
            "outcomes": {name: totals[name] for name in OUTCOMES},
            "mutations": table(found),
        }
        given.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(any(totals[name] for name in BAD))


if __name__ == "__main__":
    sys.exit(main())

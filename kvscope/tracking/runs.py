"""What an experiment tracker is given of a replay: a run for each policy and budget."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from kvscope.core.errors import ResultError
from kvscope.core.printable import encodable
from kvscope.core.summary_records import SUMMARY_FILE
from kvscope.core.trackers import Tracker
from kvscope.results.curves import Curve, curves
from kvscope.results.export import PARTS, runs_table
from kvscope.results.store import Replay

Plain = str | int | float | bool

# Columns of the table `runs` that say how a run was made; the others are its figures.
MADE = (
    *("run", "policy", "label", "budget", "budget_keys", "prefill", "phase", "allocate", "accumulate", "scope"),
    *("loop", "positions", "bounded", "reads", "clairvoyant", "published", "decisions"),
)
BY_STEP = "by_step/"  # before the name of a metric: its curve, which has another name than its mean


@dataclass(frozen=True)
class TrackedRun:
    """A run as a tracker has it.

    Attributes
    ----------
    id : str
        16 hexadecimal digits, the same for the same run of the same replay.
    name, group : str
        Policy, budget and loop; name of the replay.
    config : mapping of str to str, int, float or bool
        How it was made; without what is not known.
    params : mapping of str to str, int, float or bool
        Every parameter of the policy; nested ones are JSON.
    metrics : mapping of str to float
        Each metric of the summary: ``NAME``, and where there is one ``NAME_low``, ``NAME_high`` of its 95 % interval,
        ``NAME_count``.
    curves : mapping of str to Curve
        Each metric over the steps: ``by_step/NAME``.
    """

    id: str
    name: str
    group: str
    config: Mapping[str, Plain]
    params: Mapping[str, Plain]
    metrics: Mapping[str, float]
    curves: Mapping[str, Curve]

    @property
    def folder(self) -> str:
        """Its name as that of a folder, which no other run of the replay has."""
        name = re.sub(r"[^\w.+%-]+", "-", self.name).strip("-.")[:80]
        return f"{self.config['run']:03d}-{name}"


def tracked_runs(replay: Replay, without: Collection[str] = ()) -> Iterator[TrackedRun]:
    """Yield every run of a replay whose id is not among those `without`; its curves are read when it is its turn."""
    about = _about(replay)
    figures = [name if part == "mean" else f"{name}_{part}" for name in replay.summary.metrics for part in PARTS]
    for run, row in zip(replay.summary.runs, runs_table(replay).to_pylist(), strict=True):
        known_as = run_id(replay, run.run)
        if known_as in without:
            continue
        yield TrackedRun(
            id=known_as,
            name=encodable(run.title),
            group=encodable(replay.name),
            config=about | {name: row[name] for name in MADE if row.get(name) is not None},
            params={name: _plain(value) for name, value in run.params.items() if value is not None},
            metrics={name: float(row[name]) for name in figures if row[name] is not None},
            curves={f"{BY_STEP}{name}": curve for name, curve in curves(replay, run.run).items()},
        )


def replay_id(replay: Replay) -> str:
    """Return what a replay is known by: its name and its figures, 16 hexadecimal digits."""
    return _digest(replay.name, replay.info.checksums[SUMMARY_FILE])


def run_id(replay: Replay, run: int) -> str:
    """Return what a run is known by, 16 hexadecimal digits."""
    return _digest(replay_id(replay), str(run))


def missing(tracker: Tracker, error: ImportError) -> ResultError:
    """Return the error for a package that is not installed."""
    return ResultError(
        f"an export to {tracker} needs the package {error.name or tracker}, which is not installed",
        f'Install it: pip install "kvscope[{tracker}]"',
    )


def _about(replay: Replay) -> dict[str, Plain]:
    """Return what all runs of a replay share."""
    info, trace = replay.info, replay.info.trace
    shared = {
        "replay": replay.name,
        "trace": trace.name,
        "trace_identity": trace.identity,
        "model": trace.model,
        "sequences": len(trace.sequences),
        "tokens": sum(sequence.length for sequence in trace.sequences),
        "kvscope": info.versions.get("kvscope"),
        "device": info.device,
        "created": info.created or None,
    }
    return {name: _plain(value) for name, value in shared.items() if value is not None}


def _plain(value: object) -> Plain:
    """Return a value that every tracker takes: nested things as JSON, texts as UTF-8 can represent them."""
    if isinstance(value, str):
        return encodable(value)
    return value if isinstance(value, (int, float, bool)) else json.dumps(value)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogateescape")).hexdigest()[:16]

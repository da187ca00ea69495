"""What panels are built from: opened replays, the traces behind them, and how much of them a page may carry."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from kvscope.results.store import Replay
from kvscope.trace.reader import Trace

# What a reader looks at first, and what it cost; other metrics stand between them.
FIRST = ("retained_mass", "retained_mass_no_sinks", "ideal_mass", "ideal_cosine", "output_error")
LAST = ("read_keys", "held_keys")
OFFERS = frozenset({"summary", "fidelity", "residency", "trace"})


@dataclass(frozen=True)
class Limits:
    """How much goes into one page; whatever is left out is said there.

    Attributes
    ----------
    rows : int
        Rows of the summary table, and lines of a plot.
    map_values : int
        Numbers in all layer x head maps together.
    raster_bytes : int
        Bytes of all residency rasters and their token texts together, before base64, which adds a third.
    """

    rows: int = 400
    map_values: int = 200_000
    raster_bytes: int = 6_000_000


@dataclass(frozen=True)
class Run:
    """One policy under one budget, from one of the replays.

    Attributes
    ----------
    id : str
        Unique in the page: number of the replay, a dot, number of the run.
    replay : Replay
        Where it comes from.
    source : str
        Name of the replay, unique in the page.
    info : mapping
        Its row of ``run.json``.
    metrics : mapping
        Metric name -> ``{"mean", "low", "high", "count"}``.
    """

    id: str
    replay: Replay
    source: str
    info: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]

    @property
    def number(self) -> int:
        """Number of the run in its replay."""
        return int(self.info["run"])

    @property
    def label(self) -> str:
        """Policy with its parameters."""
        return str(self.info.get("label") or self.info["policy"])

    @property
    def budget(self) -> str | None:
        """Budget as it was given; None for a policy without one."""
        budget = self.info.get("budget")
        return None if budget is None else str(budget)

    @property
    def budget_keys(self) -> float | None:
        """Budget in keys per key/value head, mean over sequences; None for a policy without one."""
        keys = self.info.get("budget_keys")
        if self.budget is None or keys is None:
            return None
        return sum(keys) / len(keys) if isinstance(keys, list) else float(keys)

    @property
    def protocol(self) -> tuple[str, str, str]:
        """Trace identity, loop and prefill: numbers compare only where these are equal."""
        return (
            str(self.replay.info["trace"]["identity"]),
            str(self.info.get("loop", self.replay.info.get("loop", "open"))),
            str(self.info.get("prefill", self.replay.info.get("prefill", "full"))),
        )

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric; None where it was not computed or has no value."""
        value = self.metrics.get(metric, {}).get("mean")
        return None if value is None else float(value)


@dataclass(frozen=True)
class ReportInput:
    """Everything a panel may look at.

    Attributes
    ----------
    replays : tuple of Replay
        In the order in which they were named.
    traces : mapping of str to Trace
        By identity; a trace may be absent, then its token text is missing.
    limits : Limits
        How much goes into the page.
    """

    replays: tuple[Replay, ...]
    traces: Mapping[str, Trace] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)

    @cached_property
    def offers(self) -> frozenset[str]:
        """What there is for panels to need."""
        return OFFERS if any(self.trace_of(replay) for replay in self.replays) else OFFERS - {"trace"}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each replay; those of equal name get a number."""
        plain = [replay.name for replay in self.replays]
        return tuple(
            name if plain.count(name) == 1 else f"{name} ({plain[:index].count(name) + 1})"
            for index, name in enumerate(plain)
        )

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Every run of every replay."""
        return tuple(self._runs())

    @cached_property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Metric name -> its declaration, for every metric of every replay, in the order of the page."""
        found: dict[str, dict[str, Any]] = {}
        for replay in self.replays:
            for name, declaration in replay.info.get("metrics", {}).items():
                found.setdefault(name, declaration)
        for run in self.runs:
            for name in run.metrics:
                found.setdefault(name, {})
        middle = [name for name in found if name not in FIRST + LAST]
        return {name: found[name] for name in (*FIRST, *middle, *LAST) if name in found}

    @cached_property
    def ranking(self) -> tuple[Run, ...]:
        """Every run, the smallest budget first, within a budget by the first metric that has a best end."""
        return tuple(sorted(self.runs, key=self._place))

    def trace_of(self, replay: Replay) -> Trace | None:
        """Return the trace a replay was made from, if it is at hand."""
        return self.traces.get(replay.info["trace"]["identity"])

    def name_of(self, run: Run) -> str:
        """Return policy, budget and, with several replays, the replay."""
        parts = [run.label] if run.budget is None else [run.label, run.budget]
        return " · ".join(parts if len(self.replays) == 1 else [*parts, run.source])

    def metric_list(self) -> list[dict[str, Any]]:
        """Return every metric with its title, direction, range and meaning, as plain data."""
        return [
            {
                "name": name,
                "title": name.replace("_", " "),
                "direction": declaration.get("direction", "none"),
                "range": list(declaration.get("range") or (None, None)),
                "summary": str(declaration.get("summary") or ""),
            }
            for name, declaration in self.metrics.items()
        ]

    def _place(self, run: Run) -> tuple[float, float]:
        keys = math.inf if run.budget_keys is None else run.budget_keys
        directions = {name: declaration.get("direction", "none") for name, declaration in self.metrics.items()}
        ranked = next((name for name, direction in directions.items() if direction != "none"), None)
        value = None if ranked is None else run.mean(ranked)
        if ranked is None or value is None:
            return keys, math.inf
        return keys, -value if directions[ranked] == "higher" else value

    def _runs(self) -> Iterator[Run]:
        for index, replay in enumerate(self.replays):
            summaries = {row["run"]: row for row in replay.summary["runs"]}
            for info in replay.info["runs"]:
                metrics = summaries.get(info["run"], {}).get("metrics", {})
                yield Run(f"{index}.{info['run']}", replay, self.names[index], info, metrics)

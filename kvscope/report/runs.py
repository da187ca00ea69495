"""One run in the report: its name, its metrics, its kind, and the runs that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvscope.core.options import Prefill
from kvscope.core.summary_records import MetricSummary, RunSummary
from kvscope.report.encoding import rounded
from kvscope.results import ranking
from kvscope.results.store import Replay

# The metrics that come first and last; the others are between them.
FIRST = (
    "retained_mass",
    "retained_mass_no_sinks",
    "ideal_mass",
    "share_of_belady",
    "ideal_cosine",
    "output_error",
    "perplexity_ratio",
)
LAST = ("read_keys", "held_keys", "cache_bytes", "latent_entries", "latent_bytes")

TAILED = "retained_mass"  # the metric whose tails are shown
TAILS = ("share_below_half", "worst_head", "worst_step")

# Values of a run in the summary that are no metrics there; the page treats them as metrics.
BESIDE: dict[str, dict[str, Any]] = {
    "share_of_belady": {
        "direction": "higher",
        "range": [0.0, None],
        "summary": "Retained mass divided by that of the best eviction schedule: how well the policy predicts. Above 1 "
        "where a policy holds more keys, reads evicted keys again, or allocates keys among heads.",
    },
    "belady_of_ideal": {
        "direction": "none",
        "range": [0.0, 1.0],
        "summary": "Retained mass of the best eviction schedule divided by that of the ideal set: the cost of "
        "irreversible eviction for any policy.",
    },
    "share_below_half": {
        "direction": "lower",
        "range": [0.0, 1.0],
        "summary": "Share of the steps at which a head retains less than half of its mass, mean over the heads.",
    },
    "worst_head": {
        "direction": "higher",
        "range": [0.0, 1.0],
        "summary": "Retained mass of the head that retains least.",
    },
    "worst_step": {
        "direction": "higher",
        "range": [0.0, 1.0],
        "summary": "Least retained mass of a head at any step, mean over the heads.",
    },
    "held_overlap": {
        "direction": "none",
        "range": [0.0, 1.0],
        "summary": "Keys held in both loops, as a share of those held in either: how reliable the open loop is.",
    },
}


@dataclass(frozen=True)
class RunView:
    """One policy under one budget, from one of the replays.

    Attributes
    ----------
    id : str
        Unique in the page: number of the replay, a dot, number of the run.
    replay : Replay
        The replay that it is in.
    source : str
        Name of the replay, unique in the page.
    info : RunSummary
        Its record in the summary.
    metrics : mapping of str to MetricSummary
        Its metrics by name, including bounds, loop gap and tails.
    """

    id: str
    replay: Replay
    source: str
    info: RunSummary
    metrics: Mapping[str, MetricSummary]

    @classmethod
    def of(cls, id: str, replay: Replay, source: str, info: RunSummary) -> RunView:
        """Return a run from its record in the summary."""
        tails = info.tails.get(TAILED)
        beside = {
            "share_of_belady": info.bounds.share_of_belady,
            "belady_of_ideal": info.bounds.belady_of_ideal,
            "held_overlap": None if info.gap is None else info.gap.held_overlap,
            **{name: getattr(tails, name, None) for name in TAILS},
        }
        added = {name: MetricSummary(value) for name, value in beside.items() if value is not None}
        return cls(id, replay, source, info, {**info.metrics, **added})

    @property
    def number(self) -> int:
        """Number of the run in its replay."""
        return self.info.run

    @property
    def label(self) -> str:
        """Policy with its parameters."""
        return self.info.label

    @property
    def budget(self) -> str | None:
        """Budget as it was given; None for a policy without one."""
        return self.info.budget

    @property
    def budget_keys(self) -> float | None:
        """Budget in keys per key/value head, mean over sequences; None for a policy without one."""
        keys = self.info.budget_keys
        if self.budget is None:
            return None
        return float(keys) if isinstance(keys, int) else sum(keys) / len(keys)

    @property
    def protocol(self) -> tuple[str, str, str]:
        """Trace identity, loop and prefill: numbers are comparable only if these are equal."""
        return self.replay.info.trace.identity, self.info.loop, self.info.prefill

    @property
    def phase(self) -> str:
        """When it evicts: ``step``, ``prefill``, ``every:N`` or ``none``."""
        return self.info.phase

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        return ranking.kind_of(self.info)

    @property
    def comparable(self) -> tuple[str, ...] | None:
        """What must be equal in two runs that are ranked; None for a run without a budget."""
        same = (*self.protocol, self.budget or "", self.kind, self.phase, self.info.cache or "")
        return None if self.budget is None else same

    @property
    def marks(self) -> list[str]:
        """Properties in which it differs from others of its kind: allocation, published code, positions, precision."""
        marks = []
        if self.kind == "every N steps":
            marks.append(self.phase.replace(":", " ") + " steps")
        if self.info.allocate != "uniform":
            marks.append(f"{self.info.allocate} allocation")
        if "latent_entries" in self.info.metrics:
            marks.append("decides per " + self.info.scope.replace("_", " "))
        if self.info.published:
            marks.append("as in the published code")
        if self.info.positions == "compacted":
            marks.append("compacted positions")
        if self.info.cache is not None:
            marks.append(f"cache in {self.info.cache}")
        if self.info.merge is not None:
            marks.append(f"merges by {self.info.merge}")
        certificate = self.info.certificate
        if certificate is not None and not certificate.exact:
            marks.append(f"at most {certificate.gap:.2g} of mass from the optimum")
        if self.info.accumulate != "float32":
            marks.append(f"sums in {self.info.accumulate}")
        return marks

    @property
    def full_keys(self) -> float:
        """Mean number of keys in a full cache over the steps after the prompt (with streaming prefill, over all)."""
        lengths = [
            (each.prompt if self.info.prefill is Prefill.full else 0, each.length)
            for each in self.replay.info.trace.sequences
        ]
        return sum((prompt + 1 + length) / 2 for prompt, length in lengths) / len(lengths)

    def mean(self, metric: str) -> float | None:
        """Return the mean of a metric; None where it was not computed or has no value."""
        value = self.metrics.get(metric)
        return None if value is None else value.mean


@dataclass(frozen=True)
class MetricFacts:
    """Facts about a metric in the page: name, title, better direction, range, meaning."""

    name: str
    title: str
    direction: str
    range: tuple[float | None, float | None]
    summary: str

    @classmethod
    def of(cls, name: str, declaration: Mapping[str, Any]) -> MetricFacts:
        """Return the facts from the declaration of a metric; without one, no direction is better."""
        low, high = declaration.get("range") or (None, None)
        return cls(
            name,
            name.replace("_", " "),
            str(declaration.get("direction", "none")),
            (low, high),
            str(declaration.get("summary") or ""),
        )


def ends(runs: Sequence[RunView], metric: MetricFacts) -> tuple[float, float] | None:
    """Return the best and the worst value of some runs; None if no direction is better, or all are equal."""
    values = [value for run in runs if (value := rounded(run.mean(metric.name))) is not None]
    return ranking.ends(values, metric.direction)

"""One run of a replay as the report knows it: what it is called, what it costs, what it may be compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvscope.core.options import Prefill
from kvscope.core.records import MetricSummary, RunSummary
from kvscope.report.encoding import rounded
from kvscope.results.store import Replay

# What a reader looks at first, and what it cost; other metrics stand between them.
FIRST = (
    "retained_mass",
    "retained_mass_no_sinks",
    "ideal_mass",
    "share_of_belady",
    "ideal_cosine",
    "output_error",
    "perplexity_ratio",
)
LAST = ("read_keys", "held_keys")

TAILED = "retained_mass"  # the metric whose tails are shown
TAILS = ("share_below_half", "worst_head", "worst_step")

# What a summary says of a run beside its metrics; here they are metrics as any other.
BESIDE: dict[str, dict[str, Any]] = {
    "share_of_belady": {
        "direction": "higher",
        "range": [0.0, None],
        "summary": "Retained mass divided by that of the best schedule of evictions for good: how well it predicts; "
        "above 1 where a policy holds more keys, lets them come back, or shares them out among heads.",
    },
    "belady_of_ideal": {
        "direction": "none",
        "range": [0.0, 1.0],
        "summary": "Retained mass of that schedule divided by the ideal set's: what evicting for good costs anybody.",
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
        "summary": "Keys held in both loops, as a share of those held in either: how far to trust the open one.",
    },
}

# Kind -> what it means: runs of one kind hold and read in the same way, so only they are ranked among each other.
KINDS = {
    "every step": "evicts at every step, so that the cache never outgrows its budget",
    "prompt only": "compresses the prompt once and keeps whatever comes later, so that the cache grows",
    "every N steps": "evicts now and then; between that the cache grows",
    "reads a part": "holds every key and reads some of them: saves reading, not memory",
    "own size": "decides by itself how many keys stay",
    "no eviction": "keeps everything",
    "bound": "knows the future: no policy can do this, it says how far one could get",
}


@dataclass(frozen=True)
class RunView:
    """One policy under one budget, from one of the replays.

    Attributes
    ----------
    id : str
        Unique in the page: number of the replay, a dot, number of the run.
    replay : Replay
        Where it comes from.
    source : str
        Name of the replay, unique in the page.
    info : RunSummary
        What the summary says of it.
    metrics : mapping of str to MetricSummary
        Its metrics by name, with its bounds, its gap and its tails as metrics too.
    """

    id: str
    replay: Replay
    source: str
    info: RunSummary
    metrics: Mapping[str, MetricSummary]

    @classmethod
    def of(cls, id: str, replay: Replay, source: str, info: RunSummary) -> RunView:
        """Return a run with what the summary says of it."""
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
        """Trace identity, loop and prefill: numbers compare only where these are equal."""
        return self.replay.info.trace.identity, self.info.loop, self.info.prefill

    @property
    def phase(self) -> str:
        """When it evicts: ``step``, ``prefill``, ``every:N`` or ``none``."""
        return self.info.phase

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.info.clairvoyant:
            return "bound"
        if self.info.reads:
            return "reads a part"
        if self.phase == "none":
            return "no eviction"
        if not self.info.bounded:
            return "own size"
        return {"step": "every step", "prefill": "prompt only"}.get(self.phase, "every N steps")

    @property
    def comparable(self) -> tuple[str, ...] | None:
        """What two runs must share for one to be better than the other; None where a run has no budget."""
        return None if self.budget is None else (*self.protocol, self.budget, self.kind, self.phase)

    @property
    def marks(self) -> list[str]:
        """What sets it apart from the others of its kind: how keys are shared out, whose code it follows, precision."""
        marks = []
        if self.kind == "every N steps":
            marks.append(self.phase.replace(":", " ") + " steps")
        if self.info.allocate != "uniform":
            marks.append(f"{self.info.allocate} allocation")
        if self.info.published:
            marks.append("as in the published code")
        if self.info.positions == "compacted":
            marks.append("compacted positions")
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
    """What a page says of a metric: name and title, which direction is better, range, meaning."""

    name: str
    title: str
    direction: str
    range: tuple[float | None, float | None]
    summary: str

    @classmethod
    def of(cls, name: str, declaration: Mapping[str, Any]) -> MetricFacts:
        """Return what the declaration of a metric says; a metric without one has no better direction."""
        low, high = declaration.get("range") or (None, None)
        return cls(
            name,
            name.replace("_", " "),
            str(declaration.get("direction", "none")),
            (low, high),
            str(declaration.get("summary") or ""),
        )


def ends(runs: Sequence[RunView], metric: MetricFacts) -> tuple[float, float] | None:
    """Return the best and the last value of some runs; None where there is no best, or all are equal."""
    values = [value for run in runs if (value := rounded(run.mean(metric.name))) is not None]
    if metric.direction == "none" or len(values) < 2 or min(values) == max(values):
        return None
    low, high = min(values), max(values)
    return (high, low) if metric.direction == "higher" else (low, high)

"""Input of the panels: opened replays, their traces, and the limits of the page."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import pandas as pd

from kvscope.core.json import JsonDict
from kvscope.core.json_records import plain
from kvscope.core.residency import ResidencyIntervals
from kvscope.report.attended import Attended, attended
from kvscope.report.fidelity import Means, read_means
from kvscope.report.limits import Limits
from kvscope.report.parts import NamedSpan, Part, sequences_of, spread
from kvscope.report.regret import Eviction, worst_evictions
from kvscope.report.runs import BESIDE, FIRST, LAST, MetricFacts, RunView
from kvscope.results.residency import read_residency
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace

BASELINES = ("random", "window")  # shown at first: every policy should be better than these
FEW = 3  # policies of the largest kind that are shown at first
OFFERS = frozenset({"summary", "fidelity", "residency", "trace", "outcome", "answers"})
CACHED = 500_000_000  # bytes of residency intervals that are kept between panels


@dataclass(frozen=True)
class ReportInput:
    """Everything that a panel may use.

    Attributes
    ----------
    replays : tuple of Replay
        In the order of the command line.
    traces : mapping of str to Trace
        By identity; without its trace, a replay has no token text.
    limits : Limits
        How much data the page may contain.
    spans : mapping of str to sequence of NamedSpan
        Spans to show beside those of the prompts, by ``identity/number`` of the sequence.
    """

    replays: tuple[Replay, ...]
    traces: Mapping[str, Trace] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    spans: Mapping[str, Sequence[NamedSpan]] = field(default_factory=dict)

    # What was read for one panel and may serve another.
    _stored: dict[tuple[int, int, int], dict[int, ResidencyIntervals]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _scored: dict[int, pd.DataFrame] = field(default_factory=dict, init=False, repr=False, compare=False)
    _attended: dict[tuple[str, int], Attended] = field(default_factory=dict, init=False, repr=False, compare=False)
    _worst: dict[str, dict[str, list[Eviction]]] = field(default_factory=dict, init=False, repr=False, compare=False)
    _means: dict[int, Means] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def offers(self) -> frozenset[str]:
        """The data that panels may need and that is available."""
        offered = {"summary", "fidelity", "residency"}
        if any(self.trace_of(replay) for replay in self.replays):
            offered.add("trace")
        if "perplexity_ratio" in self.metrics:
            offered.add("outcome")
        if any(run.info.tasks for run in self.runs):
            offered.add("answers")
        return frozenset(offered)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Name of each replay; equal names get a number."""
        plain = [replay.name for replay in self.replays]
        return tuple(
            name if plain.count(name) == 1 else f"{name} ({plain[:index].count(name) + 1})"
            for index, name in enumerate(plain)
        )

    @cached_property
    def runs(self) -> tuple[RunView, ...]:
        """Every run of every replay."""
        return tuple(self._runs())

    @cached_property
    def metrics(self) -> dict[str, JsonDict]:
        """Metric name -> its declaration, for every metric of every replay, in the order of the page."""
        found: dict[str, JsonDict] = {}
        for replay in self.replays:
            for name, declaration in replay.summary.metrics.items():
                found.setdefault(name, plain(declaration))
        for run in self.runs:
            for name in run.metrics:
                found.setdefault(name, BESIDE.get(name, {}))
        middle = [name for name in found if name not in FIRST + LAST]
        return {name: found[name] for name in (*FIRST, *middle, *LAST) if name in found}

    @cached_property
    def ranking(self) -> tuple[RunView, ...]:
        """Every run, the smallest budget first, within a budget by the first metric with a better direction."""
        return tuple(sorted(self.runs, key=self._place))

    @cached_property
    def groups(self) -> dict[tuple[str, ...], list[RunView]]:
        """Groups of comparable runs, in the order of `ranking`."""
        groups: dict[tuple[str, ...], list[RunView]] = defaultdict(list)
        for run in self.ranking:
            if run.comparable is not None:
                groups[run.comparable].append(run)
        return dict(groups)

    @cached_property
    def detailed(self) -> tuple[RunView, ...]:
        """Every run in the order in which it is added to the page: the best of each group, the second of each, ..."""
        place = {run.id: at for group in self.groups.values() for at, run in enumerate(group)}
        order = {run.id: at for at, run in enumerate(self.ranking)}
        return tuple(sorted(self.runs, key=lambda run: (place.get(run.id, 0), order[run.id])))

    @cached_property
    def usual(self) -> tuple[str, ...]:
        """Labels to show at first: the bounds, the best few of the largest kind, the best of the others, baselines."""
        places: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for group in self.groups.values():
            for place, run in enumerate(group):
                places[run.kind][run.label].append(place)
        largest = max((kind for kind in places if kind != "bound"), key=lambda kind: len(places[kind]), default=None)
        chosen = []
        for kind, found in places.items():
            best = sorted(found, key=lambda label: sum(found[label]) / len(found[label]))
            chosen += best if kind == "bound" else best[: FEW if kind == largest else 1]
        baselines = [run.label for run in self.runs if run.info.policy in BASELINES and run.budget is not None]
        return tuple(dict.fromkeys(chosen + baselines))

    @cached_property
    def labels(self) -> list[str]:
        """Labels that get colours, in this order: those shown at first, then the others; bounds have none."""
        bounds = {run.label for run in self.runs if run.kind == "bound"}
        return [one for one in dict.fromkeys((*self.usual, *(run.label for run in self.runs))) if one not in bounds]

    @cached_property
    def first(self) -> RunView:
        """The run that a page shows at first: the best that evicts at every step, under the middle budget.

        It has competitors, if any such run has.
        """
        stepping = [run for run in self.ranking if run.kind == "every step" and run.budget is not None]
        for runs in (stepping, [run for run in self.ranking if run.budget is not None], list(self.ranking)):
            ranked = [run for run in runs if len(self.groups.get(run.comparable or (), ())) > 1] or runs
            budgets = list(dict.fromkeys(run.budget for run in ranked))
            if budgets:
                return next(run for run in ranked if run.budget == budgets[(len(budgets) - 1) // 2])
        raise ValueError("a replay has at least one run")

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Sequences whose texts fit into the page, by name."""
        return {part.name: part for part in self._parts[0]}

    @property
    def omitted(self) -> int:
        """Number of sequences that did not fit."""
        return self._parts[1]

    @cached_property
    def _parts(self) -> tuple[list[Part], int]:
        made: list[Part] = []
        left, missing = self.limits.text_bytes, 0
        for part in sequences_of(self.replays, self.traces):
            left -= sum(len(token.encode()) + 3 for token in part.tokens or ())
            if made and (left < 0 or len(made) == self.limits.sequences):
                missing += 1
            else:
                made.append(part)
        return made, missing

    def trace_of(self, replay: Replay) -> Trace | None:
        """Return the trace that a replay was made from, or None if it was not found."""
        return self.traces.get(replay.info.trace.identity)

    def parts_of(self, replay: Replay) -> list[Part]:
        """Return the sequences of a replay that the page shows."""
        return [part for part in self.parts.values() if part.identity == replay.info.trace.identity]

    def runs_of(self, part: Part) -> list[RunView]:
        """Return the runs of a sequence, in the order of `detailed`."""
        return [run for run in self.detailed if run.replay.info.trace.identity == part.identity]

    def layers_of(self, part: Part) -> list[int]:
        """Return the recorded layers of a sequence."""
        replay = next(each for each in self.replays if each.info.trace.identity == part.identity)
        return [int(layer) for layer in replay.info.trace.layers]

    def residency(self, part: Part, layer: int) -> dict[str, ResidencyIntervals]:
        """Return the residency intervals of every run in one layer of one sequence, by the run's id."""
        found: dict[str, ResidencyIntervals] = {}
        for index, replay in enumerate(self.replays):
            if replay.info.trace.identity == part.identity:
                found |= {f"{index}.{run}": each for run, each in self._residency(index, part.number, layer).items()}
        return found

    @cached_property
    def readable(self) -> dict[str, list[int]]:
        """Name of a sequence -> the layers of which all attention rows may be read, spread over the depth."""
        found: dict[str, list[int]] = {name: [] for name in self.parts}
        left = self.limits.weights
        for part in self.parts.values():
            if part.identity not in self.traces:
                continue
            for layer in spread(self.layers_of(part)):
                left -= self.traces[part.identity].heads_of(layer).heads * part.length * (part.length + 1) // 2
                if left < 0:
                    return found
                found[part.name].append(layer)
        return found

    def unread(self, part: Part) -> str | None:
        """Return a note where not all layers of a sequence were read."""
        layers, read = self.layers_of(part), sorted(self.readable[part.name])
        if len(read) == len(layers):
            return None
        named = f" ({', '.join(map(str, read))})" if read else ""
        return f"To limit the time, all rows were read in only {len(read)} of {len(layers)} layers{named}."

    def attended(self, part: Part, layer: int) -> Attended:
        """Return the attention that keys of a readable layer received, and that every run lost there, by run id."""
        if (part.name, layer) not in self._attended:
            trace = self.traces[part.identity]
            self._attended[part.name, layer] = attended(trace, part.number, layer, self.residency(part, layer))
        return self._attended[part.name, layer]

    def worst(self, part: Part) -> dict[str, list[Eviction]]:
        """Return the evictions of each run with the most regret, in the readable layers of a sequence."""
        if part.name not in self._worst:
            layers = {layer: self.attended(part, layer) for layer in self.readable[part.name]}
            runs = [run.id for run in self.runs_of(part)]
            trace = self.traces[part.identity]
            self._worst[part.name] = worst_evictions(trace, part.number, layers, runs, self.limits.worst)
        return self._worst[part.name]

    def means(self, replay: Replay) -> Means:
        """Return means by head and by step of a replay."""
        index = self.replays.index(replay)
        if index not in self._means:
            present = [name for name in self.metrics if name in replay.info.metrics]
            self._means[index] = read_means(replay, present, [part.number for part in self.parts_of(replay)])
        return self._means[index]

    def scored(self, run: RunView, part: Part) -> pd.DataFrame | None:
        """Return the scored tokens of a closed run, the columns of ``tokens.parquet``; None for an open run."""
        if run.protocol[1] != "closed":
            return None
        index = self.replays.index(run.replay)
        if index not in self._scored:
            self._scored[index] = run.replay.tokens()
        frame = self._scored[index]
        return frame[(frame["run"] == run.number) & (frame["sequence"] == part.number)]

    def title_of(self, run: RunView) -> str:
        """Return the policy, with loop and replay where these differ among the runs."""
        loop = [f"{run.protocol[1]} loop"] if len({each.protocol[1] for each in self.runs}) > 1 else []
        return " · ".join([run.label, *loop, *([run.source] if len(self.replays) > 1 else [])])

    def name_of(self, run: RunView) -> str:
        """Return the title and the budget."""
        return self.title_of(run) if run.budget is None else f"{self.title_of(run)} · {run.budget}"

    def metric_facts(self) -> list[MetricFacts]:
        """Return the facts about every metric, in the order of the page."""
        return [MetricFacts.of(name, declaration) for name, declaration in self.metrics.items()]

    def _residency(self, index: int, sequence: int, layer: int) -> dict[int, ResidencyIntervals]:
        key = (index, sequence, layer)
        if key in self._stored:
            return self._stored[key]
        read = read_residency(self.replays[index], sequence, layer)
        found = {run: each.ordered for run, each in read.items()}
        size = sum(each.bytes for every in (*self._stored.values(), found) for each in every.values())
        if size <= CACHED:
            self._stored[key] = found
        return found

    def _place(self, run: RunView) -> tuple[float, float]:
        keys = math.inf if run.budget_keys is None else run.budget_keys
        ranked = next((metric for metric in self.metric_facts() if metric.direction != "none"), None)
        value = None if ranked is None else run.mean(ranked.name)
        if ranked is None or value is None:
            return keys, math.inf
        return keys, -value if ranked.direction == "higher" else value

    def _runs(self) -> Iterator[RunView]:
        for index, replay in enumerate(self.replays):
            for run in replay.summary.runs:
                yield RunView.of(f"{index}.{run.run}", replay, self.names[index], run)

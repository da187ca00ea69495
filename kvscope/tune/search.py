"""Searching a policy's parameters on recorded attention, for the whole model, for each layer or for each head."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvscope.core.budget import Budget
from kvscope.core.errors import ReplayError, UsageError
from kvscope.core.options import Prefill, TuneLevel, choice
from kvscope.engine.allocation import ALLOCATORS
from kvscope.engine.device import torch_device
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec
from kvscope.metrics import METRICS, Metric
from kvscope.policies.base import Policy
from kvscope.policies.spec import parse_policies
from kvscope.policies.tuned import Tuned
from kvscope.replay.layer_group import step_through
from kvscope.replay.run import check
from kvscope.results.statistics import Paired, paired
from kvscope.trace.reader import TokenSequence, Trace

Array = NDArray[Any]
Place = tuple[int, int]  # number of the trace, number of its sequence


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    Attributes
    ----------
    policy : Tuned
        The choice for each layer or head.
    best : Policy
        The best single setting on the sequences that were searched.
    hindsight : Policy
        The best single setting on the held-out sequences, which nobody could know.
    searched, held_out : dict of str to list of float
        For ``tuned``, ``best`` and (held out) ``hindsight``, the metric of each sequence.
    gain : Paired
        ``tuned`` against ``best`` over the held-out sequences; its difference is positive where tuning helps.
    about : dict
        Metric, budget, prefill, sequences: what was tuned on.
    """

    policy: Tuned
    best: Policy
    hindsight: Policy
    searched: dict[str, list[float]]
    held_out: dict[str, list[float]]
    gain: Paired
    about: dict[str, Any]


def tune(
    traces: Sequence[Trace],
    policy: str,
    grid: Mapping[str, Sequence[str]],
    budget: str | int | Budget = "20%",
    *,
    per: str = TuneLevel.head,
    metric: str = "retained_mass",
    prefill: Prefill = Prefill.full,
    held_out: int | None = None,
    source: str = "tuned.toml",
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> Tuning:
    """Return the setting of a policy that suits each layer or head best, and what that gains on held-out sequences.

    In the open loop the heads of a trace do not depend on each other, so one pass over each trace that replays every
    setting of the grid gives the choice of every head, and a second one over the held-out sequences the gain. Where a
    head evicts nothing, it counts as the metric says it does.

    Parameters
    ----------
    traces : sequence of Trace
        Of one model.
    policy : str
        What to tune, as on the command line.
    grid : mapping of str to sequence of str
        Values of each parameter; every combination is tried.
    budget : str, int or Budget
        One budget.
    per : {"model", "layer", "head"}
        What gets a setting of its own; a head is a key/value head.
    metric : str
        What to improve.
    prefill : {"full", "stream"}
        As in a replay.
    held_out : int, optional
        How many sequences, the last ones, are kept for the reported gain; a quarter, at least one, by default.
    source : str
        Name of the file that will hold the choice, for labels.

    Raises
    ------
    UsageError
        For an unknown name or value, a metric without direction, settings that cannot stand side by side, fewer than
        two sequences, or traces that are of different models or the same.
    ReplayError
        If nothing is evicted.
    """
    level = choice(TuneLevel, per, "per")
    measure = METRICS.get(metric)
    if measure.direction == "none" or measure.pooled:
        raise UsageError(f"metric {metric} has no best value for a step", "Tune by retained_mass or ideal_cosine.")
    settings = _settings(policy, grid)
    _require_own_heads(settings, level)
    searched, kept = _split(traces, held_out)
    at = _Bench(traces, Budget.parse(budget), measure, prefill, torch_device(device), progress)
    layers = tuple(traces[0].layers)
    at.check(Tuned(source, tuple(settings if level != "model" else settings[:1]), layers, ((0,),) * len(layers)))
    sign = 1.0 if measure.direction == "higher" else -1.0
    scores = sign * at.measure(settings, searched, 0.0)  # [settings, sequences, layers, heads]
    best = int(scores.mean((1, 2, 3)).argmax())
    chosen = _choice(scores.mean(1), level, best)
    tuned = _tuned(source, settings, layers, chosen, level)
    later = sign * at.measure([*settings, tuned], kept, 0.5)
    means = later.mean((2, 3))  # [settings + 1, sequences]
    hindsight = int(means[:-1].mean(1).argmax())
    layer, head = np.indices(chosen.shape)
    return Tuning(
        policy=tuned,
        best=settings[best],
        hindsight=settings[hindsight],
        searched={
            "tuned": (sign * scores[chosen, :, layer, head].mean((0, 1))).tolist(),
            "best": (sign * scores[best].mean((1, 2))).tolist(),
        },
        held_out={
            "tuned": (sign * means[-1]).tolist(),
            "best": (sign * means[best]).tolist(),
            "hindsight": (sign * means[hindsight]).tolist(),
        },
        gain=paired(means[best], means[-1]),
        about={
            "policy": settings[0].name,
            "parameters": list(grid),
            "per": level,
            "metric": metric,
            "budget": str(Budget.parse(budget)),
            "prefill": prefill,
            "model": str(traces[0].header.model.get("id")),
            "traces": [trace.name for trace in traces],
            "searched_sequences": len(searched),
            "held_out_sequences": len(kept),
        },
    )


def usual_grid(policy: str) -> dict[str, list[str]]:
    """Return the values that the policy itself names as worth a search; raises UsageError if it names none."""
    (made,) = parse_policies([policy])
    grid = {item.name: [str(value) for value in item.metadata.get("search", ())] for item in fields(made)}
    found = {name: values for name, values in grid.items() if values}
    if not found:
        raise UsageError(
            f"{made.name} does not say which values are worth a search", "Give them: --grid NAME=VALUE,VALUE"
        )
    return found


def to_toml(tuning: Tuning) -> str:
    """Return the file that ``--policy NAME:@FILE`` reads."""

    def value(item: Any) -> str:
        return json.dumps(item, ensure_ascii=False)  # numbers, text, booleans and lists are written as in JSON

    gain = tuning.gain
    lines = ["# Written by kvscope tune; read with --policy NAME:@FILE", ""]
    lines += [f"{name} = {value(item)}" for name, item in tuning.about.items()]
    lines += ["", f"layers = {list(tuning.policy.layers)}"]
    lines += ["# For each of them the number of its setting, or those of its key/value heads."]
    lines += ["choice = [", *(f"  {list(row)}," for row in tuning.policy.choice), "]", "", "[held_out]"]
    lines += [f"{name} = {float(np.mean(values))}" for name, values in tuning.held_out.items()]
    lines += [f"gain = {gain.difference}", f"p = {gain.p}"]
    if gain.low is not None and gain.high is not None:
        lines += [f"gain_low = {gain.low}", f"gain_high = {gain.high}"]
    for number, policy in enumerate(tuning.policy.settings):
        usual = {item.name: item.default for item in fields(policy)}
        own = {
            name: item
            for name, item in policy.parameters().items()
            if item != usual[name] or (name in tuning.about["parameters"] and item is not None)
        }
        lines += ["", f"[[settings]]  # {number}", *(f"{name} = {value(item)}" for name, item in own.items())]
    return "\n".join(lines) + "\n"


class _Means:
    """A sink that keeps the mean over steps of one metric."""

    def __init__(self, metric: Metric) -> None:
        self.metric, self.evicted = metric, False
        self.heads: dict[tuple[int, int], dict[int, Array]] = defaultdict(dict)  # (run, sequence) -> layer -> [H]

    def residency(self, *_: Any, **__: Any) -> None:
        """Take nothing of it."""

    def fidelity(self, run: int, sequence: int, layer: int, steps: Array, values: Mapping[str, Array]) -> None:
        """Keep the mean over the steps at which something had been evicted."""
        rows = values[self.metric.name].astype(np.float64)
        empty = np.isnan(rows).all(1)
        usual = self.metric.when_nothing_evicted
        if usual is None and empty.any():
            raise ReplayError(
                f"nothing is evicted in layer {layer} of sequence {sequence}: {self.metric.name} has no value there",
                "Lower the budget, or tune by retained_mass.",
            )
        self.evicted |= not bool(empty.all())
        rows[empty] = np.nan if usual is None else usual
        self.heads[run, sequence][layer] = np.asarray(np.nanmean(rows, 1))


@dataclass(frozen=True)
class _Bench:
    """Measures policies on sequences of traces."""

    traces: Sequence[Trace]
    budget: Budget
    metric: Metric
    prefill: Prefill
    device: torch.device
    progress: Callable[[float], None] | None

    def check(self, policy: Policy) -> None:
        """Raise before any work what makes the policy impossible on these traces."""
        for trace in self.traces:
            check(trace, self._runs([policy]), self.prefill)

    def measure(self, policies: Sequence[Policy], places: Sequence[Place], done: float) -> NDArray[np.float64]:
        """Return the metric, ``[policies, sequences, layers, key/value heads]``.

        It is half of the work; `done` is the share that came before.
        """
        runs = self._runs(policies)
        found: dict[Place, _Means] = {}
        used = sorted({trace for trace, _ in places})
        for turn, number in enumerate(used):
            trace, sink = self.traces[number], _Means(self.metric)
            check(trace, runs, self.prefill)
            chosen = [_sequence(trace, index) for where, index in places if where == number]
            share = self._share(done + 0.5 * turn / len(used), 0.5 / len(used))
            step_through(trace, runs, [self.metric], self.prefill, self.device, sink, sequences=chosen, progress=share)
            if not sink.evicted:
                raise ReplayError(f"nothing is evicted from {trace.path}", "Lower the budget, or record longer texts.")
            found.update({(number, sequence.index): sink for sequence in chosen})
        return np.array(
            [
                [_grid(found[place].heads[run.number, place[1]], self.traces[place[0]]) for place in places]
                for run in runs
            ]
        )

    def _runs(self, policies: Sequence[Policy]) -> list[RunSpec]:
        return [RunSpec(number, EvictionPlan.published(policy), self.budget) for number, policy in enumerate(policies)]

    def _share(self, start: float, part: float) -> Callable[[float], None] | None:
        progress = self.progress
        return None if progress is None else (lambda share: progress(start + part * share))


def _grid(layers: Mapping[int, Array], trace: Trace) -> Array:
    """Return ``[layers, key/value heads]`` from the query heads of each layer."""
    rows = np.array([layers[layer] for layer in trace.layers])
    return np.asarray(rows.reshape(len(rows), trace.kv_heads, -1).mean(-1))


def _sequence(trace: Trace, index: int) -> TokenSequence:
    return next(sequence for sequence in trace.sequences if sequence.index == index)


def _settings(policy: str, grid: Mapping[str, Sequence[str]]) -> list[Policy]:
    if not grid or any(not values for values in grid.values()):
        raise UsageError("there is nothing to search", "Give values: --grid alpha=0.1,0.3,0.5")
    found = []
    for values in product(*grid.values()):
        found += parse_policies([policy], dict(zip(grid, values, strict=True)))
    distinct = list(dict.fromkeys(found))
    if len(distinct) < 2:
        raise UsageError("the grid has one setting", "Give two values or more: --grid alpha=0.1,0.3,0.5")
    return distinct


def _require_own_heads(settings: Sequence[Policy], level: TuneLevel) -> None:
    """Raise UsageError where heads do not decide for themselves and are to be tuned one by one."""
    for policy in settings:
        if level == "head" and policy.traits.scope == "layer":
            raise UsageError(f"{policy.label} decides per layer", "Use --per layer or --per model.")
        if level == "head" and ALLOCATORS.get(policy.traits.allocate).spans == "heads":
            raise UsageError(f"the heads of {policy.label} share a budget", "Use --per layer or --per model.")


def _split(traces: Sequence[Trace], held_out: int | None) -> tuple[list[Place], list[Place]]:
    if len({trace.identity for trace in traces}) < len(traces):
        raise UsageError("a trace is given twice", "Held-out text must not be searched: name each trace once.")
    shapes = {(tuple(trace.layers), trace.heads, trace.kv_heads, str(trace.header.model.get("id"))) for trace in traces}
    if len(shapes) != 1:
        raise UsageError("the traces are of different models", "Tune on traces of one model.")
    every = [(number, sequence.index) for number, trace in enumerate(traces) for sequence in trace.sequences]
    count = max(1, len(every) // 4) if held_out is None else held_out
    if not 1 <= count < len(every):
        raise UsageError(
            f"{count} of {len(every)} sequences cannot be held out",
            "Record several prompts, so that the gain is measured on text that was not searched.",
        )
    return every[:-count], every[-count:]


def _choice(scores: Array, level: TuneLevel, best: int) -> Array:
    """Return the number of the setting of each head, ``[layers, heads]``, from ``[settings, layers, heads]``.

    Heads of a layer or model that are tuned together have the same. Of settings that do equally well it is the first.
    """
    shape = scores.shape[1:]
    if level == "model":
        return np.full(shape, best)
    if level == "layer":
        return np.broadcast_to(scores.mean(2).argmax(0)[:, None], shape)
    return np.asarray(scores.argmax(0))


def _tuned(source: str, settings: Sequence[Policy], layers: tuple[int, ...], chosen: Array, level: TuneLevel) -> Tuned:
    """Return the policy that follows a choice, with the settings that somebody follows alone."""
    used, place = np.unique(chosen, return_inverse=True)
    rows = place.reshape(chosen.shape)[:, : None if level == "head" else 1]
    return Tuned(
        source, tuple(settings[number] for number in used), layers, tuple(tuple(map(int, row)) for row in rows)
    )

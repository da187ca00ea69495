"""Searching a policy's parameters on recorded attention, for the whole model, for each layer or for each head."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from kvscope.budget import Budget, Prefill
from kvscope.errors import ReplayError, UsageError
from kvscope.metrics import METRICS
from kvscope.policies.base import Policy
from kvscope.policies.spec import parse_policies
from kvscope.policies.tuned import Tuned
from kvscope.replay.group import Run, step_through
from kvscope.replay.plan import Plan
from kvscope.replay.run import check, torch_device
from kvscope.results.summary import interval
from kvscope.trace.reader import Sequence as TraceSequence
from kvscope.trace.reader import Trace

Array = NDArray[Any]
Per = Literal["model", "layer", "head"]
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
        For ``tuned``, ``best`` and ``hindsight``, the metric of each sequence.
    gain : float
        Mean of ``tuned - best`` over held-out sequences, positive where tuning helps.
    low, high : float or None
        Its 95 % bootstrap interval; None with fewer than five held-out sequences.
    about : dict
        Metric, budget, prefill, sequences: what was tuned on.
    """

    policy: Tuned
    best: Policy
    hindsight: Policy
    searched: dict[str, list[float]]
    held_out: dict[str, list[float]]
    gain: float
    low: float | None
    high: float | None
    about: dict[str, Any]


def tune(
    traces: Sequence[Trace],
    policy: str,
    grid: Mapping[str, Sequence[str]],
    budget: str | int | Budget = "20%",
    *,
    per: Per = "head",
    metric: str = "retained_mass",
    prefill: Prefill = "full",
    held_out: int | None = None,
    source: str = "tuned.toml",
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> Tuning:
    """Return the setting of a policy that suits each layer or head best, and what that gains on held-out sequences.

    In the open loop the heads of a trace do not depend on each other, so one pass over each trace that replays every
    setting of the grid gives the choice of every head, and a second one over the held-out sequences the gain.

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
        For an unknown name or value, a metric without direction, fewer than two sequences, or traces of different
        models.
    """
    direction = METRICS.get(metric).direction
    if direction == "none" or METRICS.get(metric).pooled:
        raise UsageError(f"metric {metric} has no best value for a step", "Tune by retained_mass or ideal_cosine.")
    settings = _settings(policy, grid)
    if per == "head" and settings[0].traits.scope == "layer":
        raise UsageError(f"{settings[0].label} decides per layer", "Use --per layer or --per model.")
    searched, kept = _split(traces, held_out)
    sign = 1.0 if direction == "higher" else -1.0
    at = _Bench(Budget.parse(budget), metric, prefill, device)
    half = None if progress is None else (lambda share: progress(share / 2))
    scores = sign * at.measure(traces, settings, searched, half)  # [settings, sequences, layers, heads]
    best = int(scores.mean((1, 2, 3)).argmax())
    tuned = Tuned(source, tuple(settings), _choice(scores.mean(1), per, best))
    other = None if progress is None else (lambda share: progress((1 + share) / 2))
    later = sign * at.measure(traces, [*settings, tuned], kept, other)
    means = later.mean((2, 3))  # [settings + 1, sequences]
    hindsight = int(means[:-1].mean(1).argmax())
    before = scores.mean((2, 3))
    difference = means[-1] - means[best]
    chosen = scores.mean(1)[_indices(tuned.choice, scores.shape)]  # what the choice reaches where it was made
    low, high = interval(difference)
    return Tuning(
        policy=tuned,
        best=settings[best],
        hindsight=settings[hindsight],
        searched={"tuned": [sign * float(chosen.mean())], "best": (sign * before[best]).tolist()},
        held_out={
            "tuned": (sign * means[-1]).tolist(),
            "best": (sign * means[best]).tolist(),
            "hindsight": (sign * means[hindsight]).tolist(),
        },
        gain=float(difference.mean()),
        low=low,
        high=high,
        about={
            "policy": settings[0].name,
            "per": per,
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
            f"{made.name} does not say which values are worth a search", "Give them: --grid recent=8,16,32"
        )
    return found


def to_toml(tuning: Tuning) -> str:
    """Return the file that ``--policy NAME:@FILE`` reads."""

    def value(item: Any) -> str:
        return json.dumps(item)  # numbers, strings, booleans and lists of them are written alike in JSON and TOML

    lines = ["# Written by kvscope tune; read with --policy NAME:@FILE", ""]
    lines += [f"{name} = {value(item)}" for name, item in tuning.about.items()]
    lines += ["", "# For each layer, the number of its setting or those of its key/value heads."]
    lines += ["choice = [", *(f"  {list(row)}," for row in tuning.policy.choice), "]", "", "[held_out]"]
    lines += [f"{name} = {float(np.mean(values))}" for name, values in tuning.held_out.items()]
    lines += [f"gain = {tuning.gain}"]
    if tuning.low is not None and tuning.high is not None:
        lines += [f"gain_low = {tuning.low}", f"gain_high = {tuning.high}"]
    for policy in tuning.policy.settings:
        lines += ["", "[[settings]]"]
        usual = {item.name: item.default for item in fields(policy)}
        own = {name: item for name, item in policy.parameters().items() if item != usual[name]}
        lines += [f"{name} = {value(item)}" for name, item in own.items()]
    return "\n".join(lines) + "\n"


def write_toml(tuning: Tuning, path: Path) -> None:
    """Write the choice to a file that does not exist yet."""
    with path.open("x", encoding="utf-8") as file:
        file.write(to_toml(tuning))


class _Means:
    """A sink that keeps the mean over steps of one metric."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.heads: dict[tuple[int, int], dict[int, Array]] = defaultdict(dict)  # (run, sequence) -> layer -> [H]

    def residency(self, *_: Any, **__: Any) -> None:
        """Take nothing of it."""

    def fidelity(self, run: int, sequence: int, layer: int, steps: Array, values: Mapping[str, Array]) -> None:
        """Keep the mean over the steps at which something had been evicted."""
        rows = values[self.metric]
        if np.isnan(rows).all(1).any():
            raise ReplayError(
                f"nothing was evicted in layer {layer} of sequence {sequence}: there is nothing to tune",
                "Lower the budget, or take longer sequences.",
            )
        self.heads[run, sequence][layer] = np.asarray(np.nanmean(rows, 1, dtype=np.float64))


@dataclass(frozen=True)
class _Bench:
    """Measures policies on sequences."""

    budget: Budget
    metric: str
    prefill: Prefill
    device: str

    def measure(
        self,
        traces: Sequence[Trace],
        policies: Sequence[Policy],
        places: Sequence[Place],
        progress: Callable[[float], None] | None,
    ) -> NDArray[np.float64]:
        """Return the metric, ``[policies, sequences, layers, key/value heads]``."""
        runs = [Run(number, Plan.published(policy), self.budget) for number, policy in enumerate(policies)]
        found: dict[Place, _Means] = {}
        used = sorted({trace for trace, _ in places})
        for done, number in enumerate(used):
            trace, sink = traces[number], _Means(self.metric)
            check(trace, runs, self.prefill)
            share = None if progress is None else (lambda part, done=done: progress((done + part) / len(used)))
            metrics = [METRICS.get(self.metric)]
            chosen = [_sequence(trace, index) for where, index in places if where == number]
            device = torch_device(self.device)
            step_through(trace, runs, metrics, self.prefill, device, sink, sequences=chosen, progress=share)
            found.update({(number, sequence.index): sink for sequence in chosen})
        return np.array(
            [[_grid(found[place].heads[run.number, place[1]], traces[place[0]]) for place in places] for run in runs]
        )


def _grid(layers: Mapping[int, Array], trace: Trace) -> Array:
    """Return ``[layers, key/value heads]`` from the query heads of each layer."""
    rows = np.array([layers[layer] for layer in trace.layers])
    return np.asarray(rows.reshape(len(rows), trace.kv_heads, -1).mean(-1))


def _sequence(trace: Trace, index: int) -> TraceSequence:
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


def _split(traces: Sequence[Trace], held_out: int | None) -> tuple[list[Place], list[Place]]:
    shapes = {(tuple(trace.layers), trace.kv_heads, str(trace.header.model.get("id"))) for trace in traces}
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


def _choice(scores: Array, per: Per, best: int) -> tuple[tuple[int, ...], ...]:
    """Return the number of the best setting from ``[settings, layers, heads]``; of equals the first."""
    if per == "model":
        return tuple((best,) for _ in range(scores.shape[1]))
    if per == "layer":
        return tuple((int(number),) for number in scores.mean(2).argmax(0))
    return tuple(tuple(int(number) for number in row) for row in scores.argmax(0))


def _indices(choice: Sequence[Sequence[int]], shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    heads = shape[3]
    number = np.array([list(row) * heads if len(row) == 1 else list(row) for row in choice])
    layer, head = np.indices(number.shape)
    return number, np.asarray(layer), np.asarray(head)

"""Which parameters of a policy suit, for the whole model, for each layer or for each head."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kvscope.core.budget import Budget
from kvscope.core.errors import ReplayError
from kvscope.core.options import TuneLevel, TuneOptions
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec
from kvscope.metrics import Metric
from kvscope.policies.base import Policy
from kvscope.policies.tuned import Tuned
from kvscope.replay.layer_group import step_through
from kvscope.replay.open_loop import OpenLoop
from kvscope.results.statistics import paired
from kvscope.trace.reader import TokenSequence, Trace
from kvscope.tune.result import Tuning

Array = NDArray[Any]
Place = tuple[int, int]  # number of the trace, number of its sequence
Progress = Callable[[float], None]


@dataclass(frozen=True)
class TuneJob:
    """A search of parameters in which nothing is left to check.

    In the open loop the heads of a trace do not depend on each other, so one pass over each trace that replays every
    setting of the grid gives the choice of every head, and a second one over the held-out sequences the gain. Where a
    head evicts nothing, it counts as the metric says it does.

    Attributes
    ----------
    traces : sequence of Trace
        Of one model.
    settings : sequence of Policy
        Every combination of the grid.
    parameters : list of str
        Names of the parameters that are searched.
    budget : Budget
        One for all.
    metric : Metric
        What to improve.
    options : TuneOptions
        Level, prefill and names.
    device : torch.device
        Where to compute.
    searched, held_out : list of Place
        Sequences that are searched, and those that the gain is measured on.
    """

    traces: Sequence[Trace]
    settings: Sequence[Policy]
    parameters: list[str]
    budget: Budget
    metric: Metric
    options: TuneOptions
    device: torch.device
    searched: list[Place]
    held_out: list[Place]

    def execute(self, progress_callback: Progress | None = None) -> Tuning:
        """Return the setting of each layer or head, and what that gains on held-out sequences.

        Raises
        ------
        ReplayError
            If nothing is evicted.
        """
        settings, level, callback = self.settings, self.options.level, progress_callback
        sign = 1.0 if self.metric.direction == "higher" else -1.0
        scores = sign * self._measure(settings, self.searched, _part(callback, 0.0))  # [settings, sequences, L, G]
        best = int(scores.mean((1, 2, 3)).argmax())
        chosen = _choice(scores.mean(1), level, best)
        tuned = _tuned(self.options.source, settings, tuple(self.traces[0].layers), chosen, level)
        later = sign * self._measure([*settings, tuned], self.held_out, _part(callback, 0.5))
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
            about=self._about(),
        )

    def _about(self) -> dict[str, Any]:
        return {
            "policy": self.settings[0].name,
            "parameters": self.parameters,
            "per": self.options.level,
            "metric": self.metric.name,
            "budget": str(self.budget),
            "prefill": self.options.prefill,
            "model": str(self.traces[0].header.model.id),
            "traces": [trace.name for trace in self.traces],
            "searched_sequences": len(self.searched),
            "held_out_sequences": len(self.held_out),
        }

    def _measure(
        self, policies: Sequence[Policy], places: Sequence[Place], progress: Progress | None
    ) -> NDArray[np.float64]:
        """Return the metric, ``[policies, sequences, layers, key/value heads]``."""
        runs = [RunSpec(number, EvictionPlan.published(policy), self.budget) for number, policy in enumerate(policies)]
        found: dict[Place, _Means] = {}
        used = sorted({trace for trace, _ in places})
        for turn, number in enumerate(used):
            trace, sink = self.traces[number], _Means(self.metric)
            chosen = [_sequence(trace, index) for where, index in places if where == number]
            work = OpenLoop(trace, runs, [self.metric], self.options.prefill, self.device)
            step_through(work, sink, sequences=chosen, progress=_part(progress, turn / len(used), 1 / len(used)))
            if not sink.evicted:
                raise ReplayError(f"nothing is evicted from {trace.path}", "Lower the budget, or record longer texts.")
            found.update({(number, sequence.index): sink for sequence in chosen})
        return np.array(
            [
                [_grid(found[place].heads[run.number, place[1]], self.traces[place[0]]) for place in places]
                for run in runs
            ]
        )


def _part(callback: Progress | None, start: float, size: float = 0.5) -> Progress | None:
    """Return a callback for a part of the work."""
    return None if callback is None else lambda share: callback(start + size * share)


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


def _grid(layers: Mapping[int, Array], trace: Trace) -> Array:
    """Return ``[layers, key/value heads]`` from the query heads of each layer."""
    rows = np.array([layers[layer] for layer in trace.layers])
    return np.asarray(rows.reshape(len(rows), trace.kv_heads, -1).mean(-1))


def _sequence(trace: Trace, index: int) -> TokenSequence:
    return next(sequence for sequence in trace.sequences if sequence.index == index)


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

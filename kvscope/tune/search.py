"""Search of the best parameters of a policy: for the whole model, for each layer or for each head."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kvscope.core.budget import Budget
from kvscope.core.errors import ReplayError
from kvscope.core.options import TuneLevel, TuneOptions
from kvscope.engine.deciding import decided
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec
from kvscope.metrics import Metric
from kvscope.policies.base import Policy
from kvscope.policies.tuned import Tuned
from kvscope.replay.layer_group import step_through
from kvscope.replay.open_loop import OpenLoop
from kvscope.results.statistics import paired
from kvscope.trace.given import near_copies
from kvscope.trace.reader import TokenSequence, Trace
from kvscope.tune.result import Tuning

Floats = NDArray[np.float64]
Floats32 = NDArray[np.float32]
Ints = NDArray[np.int64]
Place = tuple[int, int]  # number of the trace, number of its sequence
Progress = Callable[[float], None]


@dataclass(frozen=True)
class TuneJob:
    """A parameter search whose input has been checked.

    In the open loop the heads of a trace are independent. So one pass over each trace, with every setting of the grid,
    gives the best setting of every head, and a second pass over the held-out sequences measures the gain. A head that
    evicts nothing has the metric's value for that case.

    Attributes
    ----------
    traces : sequence of Trace
        Traces of one model.
    settings : sequence of Policy
        The policy with every combination of the grid.
    parameters : list of str
        Names of the parameters that are searched.
    budget : Budget
        The budget of every setting.
    metric : Metric
        The metric to improve.
    options : TuneOptions
        Level, prefill and names.
    device : torch.device
        The device to compute on.
    searched, held_out : list of Place
        The sequences that are searched, and those that the gain is measured on.
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
        """Execute the search and return the best setting of each layer or head, with its gain on held-out sequences.

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
        held_out = sign * self._measure([*settings, tuned], self.held_out, _part(callback, 0.5))
        means = held_out.mean((2, 3))  # [settings + 1, sequences]
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
            gain=paired(means[best], means[-1], self._near_copies()),
            about=self._about(),
        )

    def _near_copies(self) -> list[int]:
        """Return the cluster of near-copies of each held-out sequence; empty if no two sequences are."""
        every = [(number, sequence.index) for number, trace in enumerate(self.traces) for sequence in trace.sequences]
        clusters = dict(zip(every, near_copies(*self.traces), strict=False))  # of none, there are no clusters
        return [clusters[place] for place in self.held_out] if clusters else []

    def _about(self) -> dict[str, object]:
        return {
            "policy": self.settings[0].name,
            "parameters": self.parameters,
            "per": self.options.level,
            "metric": self.metric.name,
            "budget": str(self.budget),
            "prefill": self.options.prefill,
            **({} if self.options.scope is None else {"scope": self.options.scope}),
            "model": str(self.traces[0].header.model.id),
            "traces": [trace.name for trace in self.traces],
            "searched_sequences": len(self.searched),
            "held_out_sequences": len(self.held_out),
        }

    def _measure(
        self, policies: Sequence[Policy], places: Sequence[Place], progress: Progress | None
    ) -> NDArray[np.float64]:
        """Return the metric, ``[policies, sequences, layers, key/value heads]``."""
        latent = self.traces[0].header.latent_size is not None
        plans = [run_as(policy, self.options.scope, latent=latent) for policy in policies]
        runs = [RunSpec(number, plan, self.budget) for number, plan in enumerate(plans)]
        found: dict[Place, _Means] = {}
        used = sorted({trace for trace, _ in places})
        for done, number in enumerate(used):
            trace, sink = self.traces[number], _Means(self.metric)
            chosen = [_sequence(trace, index) for where, index in places if where == number]
            work = OpenLoop(trace, runs, [self.metric], self.options.prefill, self.device)
            step_through(work, sink, sequences=chosen, progress=_part(progress, done / len(used), 1 / len(used)))
            if not sink.evicted:
                raise ReplayError(f"nothing is evicted from {trace.path}", "Lower the budget, or record longer texts.")
            found.update({(number, sequence.index): sink for sequence in chosen})
        return np.array(
            [
                [_grid(found[place].heads[run.number, place[1]], self.traces[place[0]]) for place in places]
                for run in runs
            ]
        )


def run_as(policy: Policy, scope: str | None, *, latent: bool) -> EvictionPlan:
    """Return the plan of a policy with what decides in it; see `kvscope.engine.deciding.decided`."""
    return decided(EvictionPlan.published(policy), scope, latent=latent)


def _part(callback: Progress | None, start: float, size: float = 0.5) -> Progress | None:
    """Return a progress callback for the part of the work that begins at `start` and has the share `size`."""
    return None if callback is None else lambda share: callback(start + size * share)


class _Means:
    """A sink that keeps only the mean over steps of one metric."""

    def __init__(self, metric: Metric) -> None:
        self.metric, self.evicted = metric, False
        self.heads: dict[tuple[int, int], dict[int, Floats]] = defaultdict(dict)  # (run, sequence) -> layer -> [H]

    def residency(self, *_: object, **__: object) -> None:
        """Ignore residency."""

    def fidelity(
        self, run: int, sequence: int, layer: int, steps: Ints, values: Mapping[str, NDArray[np.float32]]
    ) -> None:
        """Store for each head the mean over the steps at which something had been evicted."""
        rows = values[self.metric.name].astype(np.float64)
        empty = np.isnan(rows).all(1)
        default = self.metric.when_nothing_evicted
        if default is None and empty.any():
            raise ReplayError(
                f"nothing is evicted in layer {layer} of sequence {sequence}: {self.metric.name} has no value there",
                "Lower the budget, or use --metric retained_mass.",
            )
        self.evicted |= not bool(empty.all())
        rows[empty] = np.nan if default is None else default
        self.heads[run, sequence][layer] = np.asarray(np.nanmean(rows, 1))


def _grid(layers: Mapping[int, Floats], trace: Trace) -> Floats:
    """Return ``[layers, key/value heads]``, the means over the query heads that share a key/value head.

    Where layers differ in their heads, the mean over all of a layer: ``[layers, 1]``.
    """
    if len({trace.heads_of(layer).kv_heads for layer in trace.layers}) > 1:
        return np.array([[layers[layer].mean()] for layer in trace.layers])
    grouped = [layers[layer].reshape(trace.heads_of(layer).kv_heads, -1).mean(-1) for layer in trace.layers]
    return np.array(grouped)


def _sequence(trace: Trace, index: int) -> TokenSequence:
    return next(sequence for sequence in trace.sequences if sequence.index == index)


def _choice(scores: Floats, level: TuneLevel, best: int) -> Ints:
    """Return the number of the chosen setting of each head, ``[layers, heads]``, from ``[settings, layers, heads]``.

    Heads that are tuned together get the same setting. Of equally good settings the first is chosen.
    """
    shape = scores.shape[1:]
    if level == "model":
        return np.full(shape, best)
    if level == "layer":
        return np.broadcast_to(scores.mean(2).argmax(0)[:, None], shape)
    return np.asarray(scores.argmax(0))


def _tuned(source: str, settings: Sequence[Policy], layers: tuple[int, ...], chosen: Ints, level: TuneLevel) -> Tuned:
    """Return the policy with the chosen settings; settings that no head uses are dropped."""
    used, place = np.unique(chosen, return_inverse=True)
    rows = place.reshape(chosen.shape)[:, : None if level == "head" else 1]
    return Tuned(
        source, tuple(settings[number] for number in used), layers, tuple(tuple(map(int, row)) for row in rows)
    )

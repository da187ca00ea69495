"""The open loop with quantised caches: rows are computed from the queries of a trace and the keys that a cache has.

A trace with rows alone cannot say what a code of a key does to them, so queries, keys and values must be stored. As
everywhere in the open loop, the queries are those of the full cache in 16 bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvscope.core.cache_scheme import CacheScheme
from kvscope.core.errors import ReplayError, UsageError
from kvscope.core.options import ReplayOptions
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.quantised_steps import QuantisedSteps
from kvscope.engine.runs import RunSpec, Sink, Tally
from kvscope.engine.scoring import BlockScorer
from kvscope.quantisation.layer import QuantisedLayer
from kvscope.replay.layer_group import LayerGroup, PlanRuns
from kvscope.replay.open_loop import OpenLoop
from kvscope.trace.layer_records import LayerAttention
from kvscope.trace.reader import TokenSequence, Trace
from kvscope.trace.shared_caches import caches_of

BLOCK = 128  # queries at a time
SAME = 0.01  # difference of a weight that storing rows in 16 bit, and a model's rounding, do not reach
VECTORS = ("queries", "keys", "values")


def not_in_open_loop(trace: Trace, scheme: CacheScheme) -> UsageError | None:
    """Return why a quantised cache cannot be replayed over a trace; None if it can."""
    why = None
    if any(f"vectors:{name}" not in trace.stored for name in VECTORS):
        what = "queries, keys and values, from which rows are computed"
        why = (f"{trace.path} does not store {what}", "Record it with --store maps+vectors.")
    elif scheme.before_rotation:
        why = ("a trace has keys after rotation only", "Use int4:kivi, or kvscope perplexity.")
    elif len(caches_of(trace.header)) < len(trace.layers):
        why = (f"layers of {trace.path} read the cache of another layer", "Use kvscope perplexity.")
    elif trace.header.latent_size is not None:
        why = (f"{trace.path} is of a model that caches latent vectors", "Use --cache 16bit.")
    elif any(trace.header.chunks_of(trace.layers)):
        why = (f"{trace.path} has layers that attend in chunks", "Use kvscope perplexity.")
    elif not trace.header.attention and (trace.header.learned_sinks or scaling_of(trace) is None):
        why = (f"{trace.path} does not say how its layers make weights of logits", "Record it with --store qkv.")
    return why and UsageError(f"a cache in {scheme} cannot be replayed in the open loop: {why[0]}", why[1])


def scaling_of(trace: Trace) -> float | None:
    """Return the factor of a model's logits, as a trace names it."""
    kernel = trace.header.model.attention
    return None if kernel is None else kernel.scaling


def attention_of(trace: Trace, layer: int) -> LayerAttention:
    """Return how a layer turns queries and keys into weights; of store ``maps+vectors`` what the header says of all."""
    header = trace.header
    if header.attention:
        return header.attention_of(layer)
    scaling = scaling_of(trace)
    assert scaling is not None, "checked when the replay was compiled"
    return LayerAttention(scaling, header.softcap, header.sliding_window[trace.layers.index(layer)])


def require_quantisable_plan(plan: EvictionPlan, schemes: Sequence[CacheScheme | None]) -> None:
    """Raise UsageError if a plan needs rows that a quantised cache changes before they are known."""
    scheme = next((one for one in schemes if one is not None), None)
    if scheme is None:
        return
    if plan.policy.traits.clairvoyant:
        raise UsageError(
            f"{plan.label} is a bound for keys in 16 bits, so it cannot run with a cache in {scheme}",
            "Replay it without --cache.",
        )
    if plan.accumulate is not None:
        raise UsageError(
            f"--accumulate compares with sums in float32, which see other rows with a cache in {scheme}",
            "Omit --accumulate, or --cache.",
        )


def open_runs(trace: Trace, runs: Sequence[RunSpec], options: ReplayOptions) -> tuple[list[RunSpec], dict[str, str]]:
    """Return the runs of the open loop, numbered, and why caches and merging rules run in the closed loop alone.

    Raises UsageError without a closed loop.
    """
    alone: dict[str, str] = {}
    for scheme in dict.fromkeys(run.cache for run in runs):
        why = None if scheme is None else not_in_open_loop(trace, scheme)
        if why is not None and options.closed is None:
            raise why
        if why is not None:
            alone[str(scheme)] = why.what
    for rule in dict.fromkeys(run.merge for run in runs if run.merge is not None):
        why = UsageError(
            f"{rule} cannot be replayed in the open loop: recorded rows have no weights for merged keys",
            "Add --perplexity to run it inside the model, or use kvscope perplexity.",
        )
        if options.closed is None:
            raise why
        alone[str(rule)] = why.what
    for plan in dict.fromkeys(run.plan for run in runs):
        require_quantisable_plan(plan, [run.cache for run in runs])
    opened = [run for run in runs if str(run.cache) not in alone and run.merge is None]
    return [replace(run, number=number) for number, run in enumerate(opened)], alone


class StoredAttention:
    """One layer's attention from the vectors of a trace, for some runs with one scheme.

    Parameters
    ----------
    trace : Trace
        With queries, keys and values.
    sequence : TokenSequence
        A sequence of it.
    layer : int
        Number of the layer.
    scheme : CacheScheme
        How caches are quantised.
    runs, prompt : int
        ``R``; steps before `prompt` attend to everything in full precision.
    device : torch.device
        The device to compute on.
    """

    def __init__(
        self,
        trace: Trace,
        sequence: TokenSequence,
        layer: int,
        scheme: CacheScheme,
        runs: int,
        prompt: int,
        device: torch.device,
    ) -> None:
        query, key, value = (
            torch.from_numpy(trace.vectors(sequence.index, layer, name).copy()).to(device)[None]
            for name in ("queries", "keys", "values")
        )
        self._how = attention_of(trace, layer)
        self._query, self._key = query.double() * self._how.scaling, key.double()
        key, value = (part.expand(runs, -1, -1, -1) for part in (key, value))
        window = self._how.sliding_window or 0
        self.layer = QuantisedLayer(scheme, key, value, prompt, torch.float32, window=window)
        self.value = value
        if trace.holds_rows:
            self._compare(trace, sequence, layer)

    @property
    def sinks(self) -> bool:
        """Whether the layer has learned sinks."""
        return self._how.sinks is not None

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows over all earlier keys, each in the precision it has in the cache, ``[R, H, b, stop]``."""
        coded, _ = self.layer.coded(start, stop)
        logits = self._logits(self._key, start, stop).expand(len(self.value), -1, -1, -1)
        if bool(coded.any()):
            logits = torch.where(coded, self._logits(self.layer.coded_key.double(), start, stop), logits)
        return self._softmax(logits, start)

    def whole_rows(self, start: int, stop: int) -> Tensor:
        """Return the same rows with all keys in full precision."""
        return self._softmax(self._logits(self._key, start, stop), start).expand(len(self.value), -1, -1, -1)

    def _compare(self, trace: Trace, sequence: TokenSequence, layer: int) -> None:
        """Raise ReplayError unless the last recorded row is what is computed from the vectors."""
        last = sequence.length - 1
        recorded = torch.from_numpy(trace.attention(sequence.index, layer, last).copy())
        difference = float((self.whole_rows(last, last + 1)[0].cpu() - recorded).abs().max())
        if not difference <= SAME:
            raise ReplayError(
                f"rows of layer {layer} that are computed from the vectors of {trace.path} differ from the recorded "
                f"ones by {difference:.3g}",
                "Record the trace with --store qkv, which says how each layer makes weights.",
            )

    def _logits(self, key: Tensor, start: int, stop: int) -> Tensor:
        groups = key.shape[1]
        query = self._query[:, :, start:stop].reshape(1, groups, -1, key.shape[-1])  # [1, G, Q * b, D]
        logits = (query @ key[:, :, :stop].transpose(2, 3)).view(len(key), -1, stop - start, stop)
        cap = self._how.softcap
        return logits if cap is None else (logits / cap).tanh() * cap

    def _softmax(self, logits: Tensor, start: int) -> Tensor:
        stop, window = logits.shape[-1], self._how.sliding_window
        query, key = torch.arange(start, stop, device=logits.device)[:, None], torch.arange(stop, device=logits.device)
        hidden = key > query if window is None else (key > query) | (key <= query - window)
        logits = logits.masked_fill(hidden, -torch.inf)
        if self._how.sinks is not None:
            sink = torch.tensor(self._how.sinks, dtype=logits.dtype, device=logits.device)[None, :, None, None]
            logits = torch.cat([logits, sink.expand(len(logits), -1, logits.shape[2], 1)], -1)
        return torch.softmax(logits, -1)[..., :stop].to(torch.float32)


@torch.inference_mode()
def step_quantised(work: OpenLoop, sink: Sink, progress: Callable[[float], None] | None = None) -> Tally:
    """Step runs with quantised caches through a trace, layer by layer, and return their counts.

    Parameters
    ----------
    work : OpenLoop
        Trace, metrics, and runs that all have a quantised cache.
    sink : Sink
        Receives residency and fidelity of each run, sequence and layer.
    progress : callable, optional
        Called with the completed share, from 0 to 1.
    """
    tally = Tally()
    parts = [(sequence, layer) for sequence in work.trace.sequences for layer in work.trace.layers]
    for number, (sequence, layer) in enumerate(parts):
        for runs in dict.fromkeys(run.cache for run in work.runs):
            group = LayerGroup(replace(work, runs=[run for run in work.runs if run.cache == runs]), sequence, [layer])
            for each in group.plan_runs:
                _step(work, sequence, layer, each)
            group.check()
            for result in group.results():
                tally.add(result.counts)
                for of_layer in result.layers:
                    of_layer.write(sink, result.run, sequence.index)
        if progress is not None:
            progress((number + 1) / len(parts))
    return tally


def _step(work: OpenLoop, sequence: TokenSequence, layer: int, runs: PlanRuns) -> None:
    """Step the runs of one plan and cache through one layer."""
    scheme = runs.runs[0].cache
    assert scheme is not None, "the others are stepped through recorded rows"
    prompt = sequence.prompt if work.prefill == "full" else 0
    attention = StoredAttention(work.trace, sequence, layer, scheme, len(runs.runs), prompt, work.device)
    scorer = BlockScorer([runs.series], attention.value[:, None]) if work.metrics else None
    QuantisedSteps(attention, runs.simulation, scorer, decides=True).attend(sequence.length, BLOCK)

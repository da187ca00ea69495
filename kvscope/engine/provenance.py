"""The part of ``run.json`` that is known before a replay begins: its source, runs, metrics and versions."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from kvscope.core.options import Loop, Prefill
from kvscope.core.records import HeadCounts, ReplayRecord, RunRecord, SequenceRef, SourceRef
from kvscope.core.version import versions as installed
from kvscope.engine.examples import examples_of
from kvscope.engine.runs import RunSpec
from kvscope.engine.signals import ROWS
from kvscope.metrics import Metric
from kvscope.policies.base import Policy
from kvscope.policies.press import Press
from kvscope.trace.given import near_copies
from kvscope.trace.layer_records import LayerHeads
from kvscope.trace.reader import TokenSequence, Trace
from kvscope.trace.shared_caches import owner_of
from kvscope.trace.storage_error import BOUNDS


def source_of(trace: Trace) -> SourceRef:
    """Return the description of a trace in ``run.json``."""
    error = trace.storage_error
    return SourceRef(
        name=trace.name,
        identity=trace.identity,
        model=trace.header.model.id,
        sequences=tuple(SequenceRef(each.prompt, each.length) for each in trace.sequences),
        lossy=None if error is None else {"top": trace.header.top, **asdict(error), "bounds": BOUNDS},
        latent_size=trace.header.latent_size,
        approximate=tuple(trace.approximate),
        near_copies=near_copies(trace),
        path=str(trace.path),
        layers=tuple(trace.layers),
        heads=trace.heads,
        kv_heads=trace.kv_heads,
        protocol=trace.header.protocol,
        shared_cache={str(layer): owner for layer in trace.layers if (owner := owner_of(trace.header, layer)) != layer},
        layer_heads=head_counts([trace.heads_of(layer) for layer in trace.layers]),
        examples=examples_of(trace),
    )


def head_counts(layers: Sequence[LayerHeads]) -> tuple[HeadCounts, ...]:
    """Return the heads of each layer, or nothing where all have equally many."""
    counts = tuple(HeadCounts(own.heads, own.kv_heads) for own in layers)
    return counts if len(set(counts)) > 1 else ()


def replay_record(
    source: SourceRef,
    sequences: Sequence[TokenSequence],
    runs: Sequence[RunSpec],
    metrics: Sequence[Metric],
    prefill: Prefill,
    command: str | None,
    skipped_metrics: Mapping[str, str] | None = None,
    device: str | None = None,
) -> ReplayRecord:
    """Return the record of a replay that has not begun: trace or text, runs, metrics, versions, command."""
    return ReplayRecord(
        trace=source,
        prefill=prefill,
        loop=" and ".join(dict.fromkeys(run.loop for run in runs)),
        metrics={item.name: item.declaration() for item in metrics},
        runs=tuple(_run(run, source, sequences, prefill) for run in runs),
        versions=versions([run.plan.policy for run in runs]),
        command=command,
        left_out=skipped_metrics or {},
        device=device,
    )


def _run(run: RunSpec, source: SourceRef, sequences: Sequence[TokenSequence], prefill: Prefill) -> RunRecord:
    policy, traits, closed = run.plan.policy, run.plan.policy.traits, run.loop is Loop.closed
    return RunRecord(
        run=run.number,
        policy=policy.name,
        label=run.label,
        params=policy.parameters(),
        budget=None if run.budget is None else str(run.budget),
        budget_keys=tuple(run.keys(sequence, prefill) for sequence in sequences),
        prefill=prefill,
        phase=run.plan.phase,
        allocate=run.plan.allocate,
        accumulate="float32" if run.plan.accumulate is None else str(run.plan.accumulate).removeprefix("torch."),
        reads=traits.reads,
        clairvoyant=traits.clairvoyant,
        bounded=traits.bounded,
        published=traits.published,
        loop=run.loop,
        scope=run.plan.decides,
        lossy=None if source.lossy is None else not closed and bool(run.plan.needs & ROWS),
        positions=run.positions if closed else None,
        open_run=run.open_run if closed else None,
        cache=None if run.cache is None else run.cache.text,
        merge=None if run.merge is None else run.merge.text,
    )


def versions(policies: Sequence[Policy] = ()) -> dict[str, str]:
    """Return the versions of Python and of the libraries that a result depends on; of kvpress where presses are run."""
    of_presses = ("kvpress", "transformers") if any(isinstance(policy, Press) for policy in policies) else ()
    return {"python": platform.python_version(), **installed("torch", "numpy", "pyarrow", *of_presses)}

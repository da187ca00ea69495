"""What ``run.json`` says of a replay."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from kvscope.core.options import Prefill
from kvscope.engine.runs import RunSpec
from kvscope.engine.signals import ROWS
from kvscope.metrics import Metric
from kvscope.trace.reader import TokenSequence, Trace
from kvscope.trace.storage_error import BOUNDS


def of_trace(trace: Trace) -> dict[str, Any]:
    """Return what ``run.json`` says of a trace."""
    error = trace.storage_error
    return {
        "name": trace.name,
        "path": str(trace.path),
        "identity": trace.identity,
        "model": trace.header.model.id,
        "sequences": [{"prompt": s.prompt, "length": s.length} for s in trace.sequences],
        "layers": list(trace.layers),
        "heads": trace.heads,
        "kv_heads": trace.kv_heads,
        "protocol": trace.header.protocol,
        **({"lossy": {"top": trace.header.top, **asdict(error), "bounds": BOUNDS}} if error is not None else {}),
        **({"approximate": trace.approximate} if trace.approximate else {}),
    }


def info(
    trace: Mapping[str, Any],
    sequences: Sequence[TokenSequence],
    runs: Sequence[RunSpec],
    metrics: Sequence[Metric],
    prefill: Prefill,
    command: str | None,
) -> dict[str, Any]:
    """Return what ``run.json`` says before the replay begins: trace or text, runs, metrics, versions, command."""

    def row(run: RunSpec) -> dict[str, Any]:
        policy, traits = run.plan.policy, run.plan.policy.traits
        return {
            "run": run.number,
            "policy": policy.name,
            "label": run.plan.label,
            "params": policy.parameters(),
            "budget": None if run.budget is None else str(run.budget),
            "budget_keys": [run.keys(sequence, prefill) for sequence in sequences],
            "prefill": prefill,
            "phase": run.plan.phase,
            "allocate": run.plan.allocate,
            "accumulate": "float32" if run.plan.accumulate is None else str(run.plan.accumulate).removeprefix("torch."),
            "reads": traits.reads,
            "clairvoyant": traits.clairvoyant,
            "bounded": traits.bounded,
            "published": traits.published,
            "loop": run.loop,
            "scope": traits.scope,
            **({"lossy": run.loop == "open" and bool(run.plan.needs & ROWS)} if "lossy" in trace else {}),
            **({} if run.loop == "open" else {"positions": run.positions, "open_run": run.open_run}),
        }

    return {
        "trace": dict(trace),
        "prefill": prefill,
        "loop": " and ".join(dict.fromkeys(run.loop for run in runs)),
        "metrics": {item.name: item.declaration() for item in metrics},
        "runs": [row(run) for run in runs],
        "versions": versions(),
        "command": command,
    }


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    libraries = ("kvscope", "torch", "numpy", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}

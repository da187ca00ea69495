"""Open-loop replay: any number of policies and budgets over one trace, which is read once."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvscope.budget import Budget, Prefill, parse_budgets
from kvscope.errors import ReplayError, TraceError, UsageError
from kvscope.metrics import METRICS, Metric
from kvscope.policies.base import Policy
from kvscope.policies.spec import parse_policies
from kvscope.replay.engine import NEVER, Scan, Shape, protection
from kvscope.replay.score import Scorer
from kvscope.results.store import Replay, ReplayWriter
from kvscope.trace.reader import Sequence as TraceSequence
from kvscope.trace.reader import Trace

BLOCK_STEPS = 64
BLOCK_BYTES = 256 * 2**20  # of one tensor of rows for all budgets of a policy
NORMS = ("value_l1", "value_l2", "key_l2")


@dataclass(frozen=True)
class Run:
    """One policy under one budget; `budget` is None for a policy that the engine holds to none."""

    number: int
    policy: Policy
    budget: Budget | None

    def keys(self, sequence: TraceSequence, prefill: Prefill) -> int:
        """Return ``B`` for a sequence."""
        if self.budget is None:
            return sequence.length
        return self.budget.keys(prompt=sequence.prompt, length=sequence.length, prefill=prefill)


def replay(
    trace: Trace,
    policies: Sequence[str | Policy],
    budgets: str | Sequence[str | int | Budget] = "20%",
    *,
    output: Path,
    prefill: Prefill = "full",
    metrics: Sequence[str] | None = None,
    params: Mapping[str, str] | None = None,
    device: str = "cpu",
    progress: Callable[[float], None] | None = None,
    command: str | None = None,
    force: bool = False,
) -> Replay:
    """Return what policies would have kept of a trace, and how faithful that is.

    Parameters
    ----------
    trace : Trace
        Recorded attention.
    policies : sequence of str or Policy
        As on the command line (``a2sf:alpha=0.7``), or ready policies.
    budgets : str, or sequence of str, int or Budget
        ``"20%,256"``; every policy runs under every budget.
    output : Path
        Folder to write: ``reports/NAME``.
    prefill : {"full", "stream"}
        Semantics of the prompt: one choice at its end, or eviction from the first step on.
    metrics : sequence of str, optional
        Names; all by default.
    params : mapping of str to str, optional
        Parameters for every named policy that has them.
    device : str
        Where to compute: ``cpu``, ``cuda``.
    progress : callable, optional
        Called with the share that is done.
    command : str, optional
        Command line, for the provenance.
    force : bool
        Whether to replace an existing output.

    Raises
    ------
    UsageError
        Unknown names, parameters or budgets; protected keys beyond the budget.
    TraceError
        If the trace lacks a signal that a policy needs.
    ReplayError
        If a replay is no result: nothing evicted below the length, NaN scores, no step to score.
    ResultError
        If the output exists, or cannot be written.
    """
    if prefill not in ("full", "stream"):
        raise UsageError(f"prefill {prefill!r} is neither full nor stream", "Use --prefill full or --prefill stream.")
    chosen = parse_policies(policies, params)
    if not chosen:
        raise UsageError("no policy is named", "Name one or more: --policy h2o --policy tova")
    runs = _runs(chosen, parse_budgets(budgets))
    wanted = [METRICS.get(name) for name in (metrics or METRICS.names())]
    _require_signals(trace, chosen)
    _require_room(trace, runs, prefill)
    _require_steps(trace, prefill)
    on = _device(device)
    started = time.monotonic()
    info = _info(trace, runs, wanted, prefill, command)
    with ReplayWriter(output, info, force=force) as writer:
        groups = list(_layer_groups(trace, runs))
        for number, (sequence, layers) in enumerate(groups):
            group = _Group(trace, sequence, layers, runs, wanted, prefill, on)
            for share in group.step_all():
                if progress is not None:
                    progress((number + share) / len(groups))
            group.write(writer)
        return writer.finish(seconds=round(time.monotonic() - started, 3))


def _runs(policies: Sequence[Policy], budgets: Sequence[Budget]) -> list[Run]:
    pairs = [(policy, budget) for policy in policies for budget in (budgets if policy.bounded else [None])]
    return [Run(number, policy, budget) for number, (policy, budget) in enumerate(pairs)]


class _Group:
    """All runs over one group of layers of one sequence, stepped together through blocks of rows."""

    def __init__(
        self,
        trace: Trace,
        sequence: TraceSequence,
        layers: Sequence[int],
        runs: Sequence[Run],
        metrics: Sequence[Metric],
        prefill: Prefill,
        device: torch.device,
    ) -> None:
        self.trace, self.sequence, self.layers, self.runs, self.device = trace, sequence, layers, runs, device
        windows = tuple(trace.header.sliding_window[trace.layers.index(layer)] for layer in layers)
        self.shape = Shape(
            layers=tuple(layers),
            heads=trace.heads,
            kv_heads=trace.kv_heads,
            prompt=sequence.prompt,
            length=sequence.length,
            sequence=sequence.index,
            windows=windows if any(window is not None for window in windows) else (),
        )
        self.missing = self._missing_mass()
        self.first = sequence.prompt if prefill == "full" else 0
        self.scans: list[tuple[list[Run], Scan, Scorer]] = []
        for policy in dict.fromkeys(run.policy for run in runs):
            own = [run for run in runs if run.policy == policy]
            keys = [run.keys(sequence, prefill) for run in own]
            scan = Scan(
                policy, keys, self.shape, prefill, self._signals(policy), missing_mass=self.missing, device=device
            )
            self.scans.append((own, scan, Scorer(scan, metrics, self.first)))

    def step_all(self) -> Iterator[float]:
        """Step every scan over the whole sequence, and score it; yields the share that is done."""
        size = self._block_steps()
        for start in range(0, self.shape.length, size):
            stop = min(start + size, self.shape.length)
            rows = self._rows(start, stop)
            for _, scan, _ in self.scans:
                for t in range(start, stop):
                    scan.step(t, rows[:, :, t - start, : t + 1])
            missing = None if self.missing is None else self.missing[..., start:stop]
            Scorer.score_block([scorer for _, _, scorer in self.scans], rows, start, missing)
            yield stop / self.shape.length
        for _, scan, _ in self.scans:
            scan.check()

    def write(self, writer: ReplayWriter) -> None:
        """Write residency and fidelity of every run and layer."""
        steps = np.arange(self.first, self.shape.length)
        for own, scan, scorer in self.scans:
            values = {name: value.cpu().numpy() for name, value in scorer.values().items()}
            leave = scan.leave.expand(-1, -1, self.shape.kv_heads, -1).cpu().numpy()
            for index, run in enumerate(own):
                for position, layer in enumerate(self.layers):
                    head, key = (axis.ravel() for axis in np.indices(leave.shape[2:]))
                    left = leave[index, position].ravel()
                    writer.residency(
                        run.number,
                        self.sequence.index,
                        layer,
                        enter=key,
                        leave=np.where(left == NEVER, -1, left),
                        kv_head=head,
                        key=key,
                    )
                    one = {name: value[index, position] for name, value in values.items()}
                    writer.fidelity(run.number, self.sequence.index, layer, steps, one)

    def _rows(self, start: int, stop: int) -> Tensor:
        parts = [self.trace.attention(self.sequence.index, layer, start, stop) for layer in self.layers]
        rows = torch.from_numpy(np.stack(parts)).to(self.device)  # [L, H, b, n]
        if not bool(torch.isfinite(rows).all()):
            raise ReplayError(
                f"{self.trace.path} holds weights that are not numbers between steps {start} and {stop - 1}",
                "Check it with: kvscope info TRACE --verify, or record it again.",
            )
        return rows

    def _signals(self, policy: Policy) -> dict[str, Tensor]:
        return {name: self._stack(name) for name in sorted(policy.needs - {"weights"})}

    def _stack(self, name: str) -> Tensor:
        parts = []
        for layer in self.layers:
            if name == "key_l2":
                parts.append(self.trace.key_norms(self.sequence.index, layer))
            else:
                parts.append(self.trace.value_norms(self.sequence.index, layer, "l1" if name == "value_l1" else "l2"))
        return torch.from_numpy(np.stack(parts)).to(self.device)

    def _missing_mass(self) -> Tensor | None:
        if not self.trace.header.learned_sinks:
            return None
        sums = [self.trace.row_sums(self.sequence.index, layer) for layer in self.layers]
        return (1 - torch.from_numpy(np.stack(sums)).to(self.device)).clamp(min=0)

    def _block_steps(self) -> int:
        most = max(len(own) for own, _, _ in self.scans)
        per_step = most * len(self.layers) * self.shape.heads * self.shape.length * 4
        return max(1, min(BLOCK_STEPS, BLOCK_BYTES // per_step))


def _layer_groups(trace: Trace, runs: Sequence[Run]) -> Iterator[tuple[TraceSequence, list[int]]]:
    """Yield sequences and as many of their layers as fit a block of rows of `BLOCK_STEPS` steps."""
    most = max(sum(run.policy == other.policy for other in runs) for run in runs)
    for sequence in trace.sequences:
        per_layer = most * trace.heads * BLOCK_STEPS * sequence.length * 4
        size = max(1, BLOCK_BYTES // per_layer)
        for start in range(0, len(trace.layers), size):
            yield sequence, trace.layers[start : start + size]


def _require_signals(trace: Trace, policies: Sequence[Policy]) -> None:
    for policy in policies:
        for name in sorted(policy.needs - {"weights"}):
            if name not in NORMS:
                raise UsageError(
                    f"{policy.label} needs a signal called {name!r}, which no trace holds",
                    f"Signals: weights, {', '.join(NORMS)}.",
                )
            if name not in trace.stored:
                raise TraceError(
                    f"{policy.label} needs {name}, which {trace.path} does not hold",
                    f"Record it again with kvscope trace, or import it with an array {name}.",
                )


def _require_room(trace: Trace, runs: Sequence[Run], prefill: Prefill) -> None:
    for run in runs:
        for sequence in trace.sequences:
            protection(run.policy, run.keys(sequence, prefill))


def _require_steps(trace: Trace, prefill: Prefill) -> None:
    for sequence in trace.sequences:
        if prefill == "full" and sequence.prompt >= sequence.length:
            raise ReplayError(
                f"sequence {sequence.index} of {trace.path} is all prompt: full prefill leaves no step to score",
                "Use --prefill stream, or record tokens after the prompt.",
            )


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} cannot be used: {error}".splitlines()[0], "Use --device cpu.") from error
    return device


def _info(
    trace: Trace, runs: Sequence[Run], metrics: Sequence[Metric], prefill: Prefill, command: str | None
) -> dict[str, Any]:
    def row(run: Run) -> dict[str, Any]:
        return {
            "run": run.number,
            "policy": run.policy.name,
            "label": run.policy.label,
            "params": run.policy.parameters(),
            "budget": None if run.budget is None else str(run.budget),
            "budget_keys": [run.keys(sequence, prefill) for sequence in trace.sequences],
            "prefill": prefill,
            "phase": run.policy.phase,
            "loop": "open",
            "scope": run.policy.scope,
        }

    return {
        "trace": {
            "name": trace.name,
            "path": str(trace.path),
            "identity": trace.identity,
            "model": trace.header.model.get("id"),
            "sequences": [{"prompt": s.prompt, "length": s.length} for s in trace.sequences],
            "layers": list(trace.layers),
            "heads": trace.heads,
            "kv_heads": trace.kv_heads,
        },
        "prefill": prefill,
        "loop": "open",
        "metrics": {item.name: item.declaration() for item in metrics},
        "runs": [row(run) for run in runs],
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("kvscope", "torch", "numpy", "pyarrow")},
        },
        "command": command,
    }

"""What to run next: one suggestion that fits the trace at hand."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kvscope.core.errors import REPLAY_COMMAND
from kvscope.core.options import Prefill

if TYPE_CHECKING:
    from kvscope.trace.reader import Trace

ONE_HEAD_AT_A_TIME = "kvscope replay --policy h2o --policy window"  # neither compares the heads of a layer


def next_command(trace: Trace) -> str:
    """Return the line that follows a new trace: a replay that can run on it, or why none can.

    Any policy that needs attention weights alone runs on every store: maps, maps+vectors, qkv and topk. What rules a
    replay out is a query stride; what rules out policies that decide per layer, as TOVA does, is a choice of heads. A
    trace that is all prompt is replayed with streaming prefill. A trace outside ``traces/`` is named, since ``kvscope
    replay`` would take another one.
    """
    from kvscope.cli.places import TRACES

    header = trace.header
    if header.query_stride > 1:
        return "This trace cannot be replayed, because rows are missing: record it again without --query-stride."
    command = REPLAY_COMMAND if not header.head_numbers else ONE_HEAD_AT_A_TIME
    if any(sequence.prompt >= sequence.length for sequence in trace.sequences):
        command += " --prefill stream"
    if trace.path.resolve().parent != TRACES.resolve():
        command = command.replace("replay", f"replay {shlex.quote(str(trace.path))}", 1)
    return f"next: {command}"


def replay_of(spec: str, traces: Sequence[str], prefill: Prefill = Prefill.full, scope: str | None = None) -> str:
    """Return the command that replays one policy; a trace is named in it if `traces` names exactly one."""
    words = ["kvscope", "replay", *(traces if len(traces) == 1 else ()), "--policy", spec]
    words += [] if prefill is Prefill.full else ["--prefill", prefill.value]
    return shlex.join(words + ([] if scope is None else ["--scope", scope]))


def next_report(replay: Path) -> str:
    """Return the line that follows a new replay; one outside ``reports/`` is named, as ``kvscope report`` needs it."""
    from kvscope.cli.places import REPORTS

    name = [] if replay.resolve().parent == REPORTS.resolve() else [str(replay)]
    return f"next: {shlex.join(['kvscope', 'report', *name])}"

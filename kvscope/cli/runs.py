"""Which runs of a replay a command is about, and the trace that they were made from."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvscope.core.records import RunRecord
    from kvscope.results.store import Replay
    from kvscope.trace.reader import Trace


def chosen(replay: Replay, policies: Sequence[str] | None, budgets: Sequence[str] | None) -> list[RunRecord]:
    """Return the runs of the named policies and budgets, in the order of the replay.

    Raises
    ------
    UsageError
        If there is none.
    """
    from kvscope.analysis.compare import runs_named
    from kvscope.core.errors import UsageError

    numbers = {run.run for policy in policies or () for run in runs_named(replay, policy)}
    wanted = {part.strip() for budget in budgets or () for part in budget.split(",")}
    runs = [
        run
        for run in replay.info.runs
        if (not policies or run.run in numbers) and (not wanted or str(run.budget) in wanted)
    ]
    if not runs:
        there = ", ".join(dict.fromkeys(str(run.budget) for run in replay.info.runs))
        raise UsageError(f"{replay.path} has no such run at {', '.join(sorted(wanted))}", f"Its budgets: {there}.")
    return runs


def trace_of(replay: Replay, given: str | None) -> Trace:
    """Return the trace that a replay was made from: the one named, or where it was then.

    Raises
    ------
    ResultError
        If the replay was made of plain text.
    TraceError
        If there is no trace any more.
    """
    from kvscope.cli import places
    from kvscope.core.errors import ResultError, TraceError
    from kvscope.trace.reader import open_trace

    source = replay.info.trace
    if source.path is None:
        raise ResultError(
            f"{replay.path} was made of plain text, and its attention is not recorded",
            "Record a trace with kvscope trace, and replay that.",
        )
    if given is not None:
        return open_trace(places.find_trace(given))
    try:
        return open_trace(source.path)
    except TraceError as error:
        raise TraceError(error.what, "Say where it is now with --trace.") from error


def title(run: Mapping[str, object]) -> str:
    """Return what a run of an analysis is called in a table: label, budget and loop."""
    return f"{run['label']} {run['budget'] or 'full cache'} {run['loop']}"

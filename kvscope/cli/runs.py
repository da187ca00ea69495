"""The runs of a replay that a command line selects, and the trace of the replay."""

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
    selected = {part.strip() for budget in budgets or () for part in budget.split(",")}
    runs = [
        run
        for run in replay.info.runs
        if (not policies or run.run in numbers) and (not selected or str(run.budget) in selected)
    ]
    if not runs:
        known = ", ".join(dict.fromkeys(str(run.budget) for run in replay.info.runs if run.budget is not None))
        raise UsageError(
            f"{replay.path} has no such run at {', '.join(sorted(selected))}",
            f"Name one of its budgets: {known}." if known else "Omit --budget: these policies have no budget.",
        )
    return runs


def trace_of(replay: Replay, given: str | None, *, compare: bool = True) -> Trace:
    """Return the trace of a replay: the one that is named, or the one at the recorded path.

    Parameters
    ----------
    replay : Replay
        The replay.
    given : str or None
        Name or path of the trace.
    compare : bool
        Whether the checksums of its files are compared.

    Raises
    ------
    ResultError
        If the replay was made from plain text.
    TraceError
        If there is no trace at this path.
    """
    from kvscope.cli import places
    from kvscope.core.errors import ResultError, TraceError
    from kvscope.trace.reader import open_trace

    source = replay.info.trace
    if source.path is None:
        raise ResultError(
            f"{replay.path} was made from plain text, without recorded attention",
            "Record a trace of the text with kvscope trace, and replay that.",
        )
    if given is not None:
        return open_trace(places.find_trace(given), compare=compare)
    try:
        return open_trace(source.path, compare=compare)
    except TraceError as error:
        raise TraceError(error.what, "Name its new path with --trace.") from error


def how_to_name_one(runs: Sequence[RunRecord]) -> str:
    """Return which options name one of several runs: by its number where policy and budget name more than one."""
    if len({(run.label, run.budget) for run in runs}) > 1:
        return "--policy and --budget"
    return " or ".join(f"--policy {run.run} ({run.loop} loop)" for run in runs)


def title(run: Mapping[str, object]) -> str:
    """Return the name of a run of an analysis in a table: label, budget and loop."""
    from kvscope.core.budget import NO_BUDGET

    return f"{run['label']} {run['budget'] or NO_BUDGET} {run['loop']}"

"""The summary that a build is compared with: read, judged whole, and replaced by a newer one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvscope.core.errors import ResultError, UsageError
from kvscope.results.schema import SUMMARY, SUMMARY_KIND, load_json
from kvscope.results.store import open_replay

ALIGNED = ("policy", "params", "budget", "prefill", "loop")  # what makes two runs the same run


def load_summary(path: Path | str) -> dict[str, Any]:
    """Return the summary of a replay folder, or of a committed ``summary.json``, and its path as ``source``.

    Raises
    ------
    ResultError
        If it is neither, incomplete, damaged, or of another version.
    """
    path = Path(path)
    summary = load_json(path, SUMMARY_KIND, "summary") if path.is_file() else open_replay(path).summary
    fault = _fault(summary)
    if fault:
        raise ResultError(f"{path} is damaged: {fault}", f"Replay again, and keep its {SUMMARY}.")
    return {"source": str(path), **summary}


def accept(new: Path, baseline: Path) -> None:
    """Make the summary of `new`, byte by byte, the baseline; a reader sees the old one or the new one, never a part.

    Parameters
    ----------
    new : Path
        Replay folder or ``summary.json``.
    baseline : Path
        File to write; need not exist.

    Raises
    ------
    UsageError
        If `baseline` is no ``.json`` file: a replay is a record of what was, and stays.
    ResultError
        If `new` is no whole summary, or the file cannot be written.
    """
    if baseline.is_dir() or baseline.suffix != ".json":
        raise UsageError(
            f"{baseline} is no summary file, and a replay is not changed afterwards", "Name a file: baseline.json"
        )
    load_summary(new)
    content = (new if new.is_file() else new / SUMMARY).read_bytes()
    unfinished = baseline.with_name(baseline.name + ".incomplete")
    try:
        baseline.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(content)
            unfinished.replace(baseline)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ResultError(f"cannot write {baseline}: {error.strerror}", "Name a file that can be written.") from error


def _fault(summary: Mapping[str, Any]) -> str:
    """Return what a summary lacks; nothing if it can be compared."""
    trace, metrics, runs = (summary.get(name) for name in ("trace", "metrics", "runs"))
    if not isinstance(trace, dict) or "identity" not in trace:
        return "it does not say of which trace it is"
    if not isinstance(metrics, dict) or not all(map(_is_declaration, metrics.values())):
        return "it does not say which way its metrics are better"
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        return "it has no runs"
    for number, run in enumerate(runs):
        lacking = [name for name in (*ALIGNED, "run", "label", "metrics") if name not in run]
        if lacking:
            return f"run {number} has no {lacking[0]}"
        if not isinstance(run["metrics"], dict):
            return f"run {number} has no metrics"
        for name, value in run["metrics"].items():
            if name not in metrics or not isinstance(value, dict) or not _is_mean(value.get("mean")):
                return f"run {number} has no readable {name}"
    return ""


def _is_declaration(value: object) -> bool:
    return isinstance(value, dict) and value.get("direction") in ("higher", "lower", "none")


def _is_mean(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))

"""Over time: every metric against the step, together with the keys held, which show a growing cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvscope.core.json import JsonDict
from kvscope.report.encoding import packed_bytes, packed_floats
from kvscope.report.panel import panel
from kvscope.report.parts import Part
from kvscope.report.runs import RunView
from kvscope.report.source import ReportInput

RATIO = "perplexity_ratio"  # of a bin: exp of the mean loss change of its tokens


@panel(
    "over-time",
    title="Over time",
    order=30,
    needs=("fidelity",),
    detail=True,
    help="The upper plot is the chosen metric, mean over layers and heads, against the step; the lower one is how "
    "many keys are held at that step. A policy that compresses only the prompt looks better as the sequence grows, and "
    "the lower plot shows the cost.",
)
def over_time(source: ReportInput) -> JsonDict | None:
    """Return for each sequence the means of every metric by step, for as many runs as fit, in even bins of steps."""
    left = source.limits.line_bytes
    parts: JsonDict = {}
    missing = 0
    for part in source.parts.values():
        runs = source.runs_of(part)
        lines = {run.id: _lines(source, run, part) for run in runs}
        steps = np.flatnonzero(np.any([~np.isnan(each) for line in lines.values() for each in line.values()], axis=0))
        if not len(steps):
            continue
        edges = bins(int(steps[0]), int(steps[-1]) + 1, 2 * source.limits.bins)
        made: JsonDict = {}
        for run in runs:
            packed = {
                name: packed_floats(np.exp(_binned(values, edges)) if name == RATIO else _binned(values, edges))
                for name, values in lines[run.id].items()
                if not np.isnan(values).all()
            }
            left -= sum(packed_bytes(each) for each in packed.values())
            if left < 0:
                break
            made[run.id] = packed
        missing += len(runs) - len(made)
        parts[part.name] = {"edges": edges.tolist(), "runs": made}
    if not parts:
        return None
    notes = [f"Lines of {missing} runs are omitted to limit the size of the page; fidelity.parquet has them."]
    return {"parts": parts, "notes": notes if missing else []}


def bins(start: int, stop: int, most: int) -> NDArray[np.int64]:
    """Return the edges of at most `most` bins of nearly equal width, whole steps from `start` to `stop`."""
    count = min(most, stop - start)
    return np.asarray(start + (np.arange(count + 1) * (stop - start)) // count)


def _lines(source: ReportInput, run: RunView, part: Part) -> dict[str, NDArray[np.float64]]:
    """Return metric -> ``[T]``: at every step the mean over layers and heads, or the outcome of the token after it."""
    means = source.means(run.replay)
    lines = {name: values[means.runs[run.number]] for name, values in means.by_step[part.number].items()}
    scored = source.scored(run, part)
    if scored is not None:
        steps = scored["position"].to_numpy() - 1  # at which the token is predicted
        change = scored["nll_policy"] - scored["nll_full"]
        for name, values in ((RATIO, change), ("token_kl", scored["kl"]), ("top1_agreement", scored["top1_equal"])):
            lines[name] = np.full(part.length, np.nan)
            lines[name][steps] = values.to_numpy(np.float64)
    return lines


def _binned(values: NDArray[np.float64], edges: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean of each bin, of the steps that have a value; NaN where none has."""
    there = ~np.isnan(values)
    sums = np.add.reduceat(np.where(there, values, 0.0), edges[:-1])
    counts = np.add.reduceat(there.astype(np.int64), edges[:-1])
    # the last bin of reduceat extends to the end of the sequence
    means = np.full(len(counts), np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means

"""Text: prompt and continuation as running text, coloured by the share of heads that hold each token."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvscope.core.json import JsonDict
from kvscope.report.encoding import packed, packed_bytes, packed_floats
from kvscope.report.panel import panel
from kvscope.report.panels.over_time import bins
from kvscope.report.parts import Part
from kvscope.report.runs import RunView
from kvscope.report.source import ReportInput

ALL = 255  # a byte: the token is held by every head of every layer


@panel(
    "text",
    title="Text",
    order=60,
    needs=("residency", "trace"),
    detail=True,
    help="Every token is shaded by the share of key/value heads, over all layers, that hold it after the step chosen "
    "in the bar; struck through means that no head does. Choose a token to see when each head of each layer "
    "evicted it. The tokens of an image are shown as ▦, in an edge of their own colour.",
)
def text_view(source: ReportInput) -> JsonDict | None:
    """Return for each sequence the share of heads that hold each token at some steps, for as many runs as fit."""
    left = source.limits.share_bytes
    parts: JsonDict = {}
    missing = total = 0
    for part in source.parts.values():
        runs = source.runs_of(part)
        if part.tokens is None:
            continue
        total += len(runs)
        steps = _steps(part, runs, source.limits.bins)
        shares = _shares(source, part, runs, steps)
        made = {}
        for run in runs:
            each = packed(shares[run.id])
            left -= packed_bytes(each)
            if left < 0:
                break
            made[run.id] = each
        missing += len(runs) - len(made)
        parts[part.name] = {
            "steps": steps.tolist(),
            "heads": _heads(source, part),
            "runs": made,
            "surprise": _surprise(source, part),
            "loss": {run.id: loss for run in runs if (loss := _loss(source, part, run)) is not None},
        }
    if not parts:
        return None
    notes = [f"{missing} of {total} runs are omitted to limit the size of the page; residency.parquet has them."]
    return {"parts": parts, "notes": notes if missing else []}


def _steps(part: Part, runs: list[RunView], most: int) -> NDArray[np.int64]:
    """Return the steps whose shares are in the page, from the first at which anything can have been evicted."""
    start = max(part.prompt - 1, 0) if all(run.protocol[2] == "full" for run in runs) else 0
    return bins(start, part.length, most)[1:] - 1


def _heads(source: ReportInput, part: Part) -> int:
    return sum(next(iter(source.residency(part, layer).values())).heads for layer in source.layers_of(part))


def _shares(
    source: ReportInput, part: Part, runs: list[RunView], steps: NDArray[np.int64]
) -> dict[str, NDArray[np.int64]]:
    """Return for each run the share of all heads of all layers that hold each token, ``[S, T]`` in parts of 255."""
    holding = {run.id: np.zeros((len(steps), part.length), np.int64) for run in runs}
    for layer in source.layers_of(part):
        for run, intervals in source.residency(part, layer).items():
            holding[run] += intervals.holding_heads(steps)
    heads = _heads(source, part)
    return {run: (ALL * counts + heads // 2) // heads for run, counts in holding.items()}


def _surprise(source: ReportInput, part: Part) -> JsonDict | None:
    """Return the loss of every token under the full cache, in nats; None where the trace has none."""
    frame = source.traces[part.identity].tokens(part.number).sort_values("position")
    losses = -frame["logprob"].to_numpy(np.float64)
    return None if np.isnan(losses).all() else packed_floats(losses)


def _loss(source: ReportInput, part: Part, run: RunView) -> JsonDict | None:
    """Return the increase of the loss of every token under a run, in nats; None without a closed loop."""
    scored = source.scored(run, part)
    if scored is None:
        return None
    change = np.full(part.length, np.nan)
    change[scored["position"].to_numpy()] = (scored["nll_policy"] - scored["nll_full"]).to_numpy(np.float64)
    return packed_floats(change)

"""Regrets: the evictions that lost most attention, measured by the full-cache attention after each eviction."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvscope.core.json import Json, JsonDict
from kvscope.report.encoding import packed_bytes, packed_floats, rounded
from kvscope.report.panel import panel
from kvscope.report.parts import Part
from kvscope.report.source import ReportInput


@panel(
    "regrets",
    title="Regrets",
    order=65,
    needs=("residency", "trace"),
    detail=True,
    help="Each row is one key that the chosen run evicted too early. Its regret is the full-cache attention on the "
    "key, summed over all later steps that could not see it, mean over the query heads that share it. Choose a "
    "row to show that head, that token and the step that missed it most in all panels. Tokens in a named span of the "
    "prompt, as a needle, have its name.",
)
def regrets(source: ReportInput) -> JsonDict | None:
    """Return the worst evictions of every run, and the regret of every token over all layers that were read."""
    left = source.limits.key_bytes
    parts: JsonDict = {}
    notes = []
    for part in source.parts.values():
        if part.identity not in source.traces:
            continue
        notes += [note for note in [source.unread(part)] if note]
        layers = sorted(source.readable[part.name])
        tokens: JsonDict = {}
        for run in source.runs_of(part):
            total = _by_token(source, part, layers, run.id)
            each = packed_floats(total)
            left -= packed_bytes(each) if total.any() else 0
            if left >= 0 and total.any():
                tokens[run.id] = each
        rows = {
            run: [[*each[:4], rounded(each.mass, 4), each.missed, rounded(each.weight, 4)] for each in evictions]
            for run, evictions in source.worst(part).items()
        }
        parts[part.name] = {"worst": rows, "tokens": tokens, "spans": _spans(source, part)}
    if not parts:
        return None
    if left < 0:
        notes.append("For some runs, the regret of every token is omitted to limit the size of the page.")
    return {"parts": parts, "notes": list(dict.fromkeys(notes))}


def _spans(source: ReportInput, part: Part) -> list[Json]:
    """Return name, first token and token after the last one of every span: those of the prompt, then those given."""
    recorded = source.traces[part.identity].record.sequences[part.number].spans
    given = source.spans.get(f"{part.identity}/{part.number}", ())
    spans: list[Json] = [[span.name, span.start, span.stop] for span in recorded]
    return spans + [[span.name, span.start, span.stop] for span in given]


def _by_token(source: ReportInput, part: Part, layers: list[int], run: str) -> NDArray[np.float64]:
    """Return the regret of each token, summed over the key/value heads of the layers, ``[T]``."""
    total = np.zeros(part.length)
    for layer in layers:
        losses = source.attended(part, layer).losses.get(run)
        if losses is not None:
            total += np.bincount(losses.key, losses.mass, part.length)
    return total

"""Spans by head: the step at which each key/value head lost a fact, a question or another span of tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from kvscope.core.json import Json, JsonDict
from kvscope.core.residency import ResidencyIntervals
from kvscope.report.encoding import packed, packed_bytes
from kvscope.report.panel import panel
from kvscope.report.parts import NamedSpan, Part
from kvscope.report.runs import RunView
from kvscope.report.source import ReportInput

KEPT = -1  # not lost until the end
NO_HEAD = -2  # the layer has fewer heads
WHEN = ("first token", "half", "last token")


@panel(
    "spans",
    title="Spans by head",
    order=55,
    needs=("residency",),
    detail=True,
    help="Each cell is one key/value head of one layer: the step at which the chosen run lost the first token, half or "
    "the last token of a span of the prompt, such as a fact or the question. Light heads held it longest. Choose a "
    "cell to see this head in all panels, and follow the links to its residency and to the text.",
)
def spans(source: ReportInput) -> JsonDict | None:
    """Return for each sequence its spans, and for each run the steps at which its heads lost them, ``[S, 3, L, G]``.

    None where no sequence has a span.
    """
    left, missing = source.limits.map_bytes, 0
    parts: JsonDict = {}
    for part in source.parts.values():
        named = spans_of(source, part)
        if not named:
            continue
        runs: dict[str, Json] = {}
        for run in source.runs_of(part):
            steps = packed(lost_by(source, part, run, named))
            left -= packed_bytes(steps)
            if left < 0:
                missing += 1
            else:
                runs[run.id] = steps
        shown: list[Json] = [{"name": one.name, "start": one.start, "stop": one.stop} for one in named]
        parts[part.name] = {"spans": shown, "layers": source.layers_of(part), "runs": runs}
    if not parts:
        return None
    notes: list[Json] = [
        f"Maps of {missing} runs are omitted to limit the size of the page; residency.parquet has the data."
    ]
    return {"parts": parts, "when": list(WHEN), "notes": notes if missing else []}


def spans_of(source: ReportInput, part: Part) -> list[NamedSpan]:
    """Return the spans of a sequence: those of its prompt, then those given; the second of a name is ``NAME-2``."""
    trace = source.traces.get(part.identity)
    recorded = [] if trace is None else trace.record.sequences[part.number].spans
    found = [NamedSpan(one.name, one.start, one.stop) for one in recorded if not one.name.startswith("image ")]
    seen: Counter[str] = Counter()
    named = []
    for one in [*found, *source.spans.get(f"{part.identity}/{part.number}", ())]:
        seen[one.name] += 1
        nth = seen[one.name]
        named.append(NamedSpan(f"{one.name}-{nth}" if nth > 1 else one.name, one.start, one.stop))
    return named


def lost_by(source: ReportInput, part: Part, run: RunView, named: list[NamedSpan]) -> NDArray[np.int64]:
    """Return the steps at which every head of a run lost spans, ``[S, 3, L, G]``: see `lost`."""
    layers = source.layers_of(part)
    heads = run.replay.info.trace.kv_heads
    steps = np.full((len(named), len(WHEN), len(layers), heads), NO_HEAD)
    for place, layer in enumerate(layers):
        found = source.residency(part, layer).get(run.id)
        if found is not None:
            for at, span in enumerate(named):
                steps[at, :, place, : found.heads] = lost(found, span)
    return steps


def lost(residency: ResidencyIntervals, span: NamedSpan) -> NDArray[np.int64]:
    """Return the first step, from the span's last token on, after which a head does not hold all, half, any of it.

    ``[3, G]``; `KEPT` where there is none. Half is lost when no more than half of the tokens are held.
    """
    held = residency.held_tokens(span.start, span.stop)[:, span.stop - 1 :]  # [G, T - stop + 1]
    size = span.stop - span.start
    made = []
    for below in (held < size, 2 * held <= size, held == 0):
        made.append(np.where(below.any(1), below.argmax(1) + span.stop - 1, KEPT))
    return np.stack(made)

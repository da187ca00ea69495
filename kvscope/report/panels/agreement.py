"""Agreement: which share of their keys two policies have in common."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from kvscope.core.json import JsonDict
from kvscope.report.encoding import packed_floats, rounded
from kvscope.report.panel import panel
from kvscope.report.panels.over_time import bins
from kvscope.report.parts import Part
from kvscope.report.runs import RunView
from kvscope.report.source import ReportInput
from kvscope.results.ranking import KINDS

STEPS = 32  # evenly spaced steps at which sets of keys are compared
MOST = 40  # runs of one budget that are compared


@panel(
    "agreement",
    title="Agreement",
    order=75,
    needs=("residency",),
    detail=True,
    help="Each cell is the share of keys that two policies both hold, of those that either holds, over all heads and "
    "layers at evenly spaced steps, under the budget of the chosen run. Policies that agree make the same choice under "
    "two names; a low number with equal fidelity means that more than one set of keys is good. Where both loops were "
    "replayed, a second table shows the overlap of the keys that a policy holds in the open and in the closed loop.",
)
def agreement(source: ReportInput) -> JsonDict | None:
    """Return for each budget the overlap (Jaccard index) of the keys that every two runs hold; sparse readers: read."""
    groups: dict[tuple[str, ...], list[RunView]] = defaultdict(list)
    for run in source.detailed:
        if run.budget is not None:
            groups[(*run.protocol, run.budget)].append(run)
    made: list[JsonDict] = []
    notes = [
        f"Keys are compared at {STEPS} evenly spaced steps; for a policy that reads a part, the keys that it reads."
    ]
    for (identity, *_, budget), runs in groups.items():
        shown = runs[:MOST]
        if len(shown) < len(runs):
            notes.append(f"At budget {budget}, {len(shown)} of {len(runs)} runs are compared.")
        parts = [part for part in source.parts.values() if part.identity == identity]
        if len(shown) > 1 and parts:
            shown = _ordered(source, shown)
            made.append({"runs": [run.id for run in shown], "values": packed_floats(_overlap(source, parts, shown))})
    loops = _loops(source)
    return {"groups": made, "loops": loops, "notes": notes} if made or loops else None


def _loops(source: ReportInput) -> list[JsonDict]:
    """Return for each run of the closed loop its overlap with the open loop: over all layers, and in each."""
    found: list[JsonDict] = []
    for run in source.ranking:
        gap = run.info.gap
        if gap:
            layers = [rounded(value) for value in gap.held_overlap_by_layer.values()]
            found.append({"run": run.id, "all": rounded(gap.held_overlap), "layers": layers})
    return found


def _ordered(source: ReportInput, runs: list[RunView]) -> list[RunView]:
    place = {run.id: at for at, run in enumerate(source.ranking)}
    return sorted(runs, key=lambda run: (list(KINDS).index(run.kind), place[run.id]))


def _overlap(source: ReportInput, parts: list[Part], runs: list[RunView]) -> NDArray[np.float64]:
    """Return keys in both sets over keys in either, summed over sequences, layers, heads and steps, ``[R, R]``."""
    both = np.zeros((len(runs), len(runs)))
    for part in parts:
        steps = bins(min(part.prompt, part.length - 1), part.length, STEPS)[1:] - 1
        if any(run.protocol[2] == "stream" for run in runs):
            steps = bins(0, part.length, STEPS)[1:] - 1
        for layer in source.layers_of(part):
            residency = source.residency(part, layer)
            for step in steps:
                held = np.stack([residency[run.id].held_after(step) for run in runs]).astype(np.float32)  # [R, G * T]
                both += held @ held.T
    size = both.diagonal()
    either = size[:, None] + size[None] - both
    return np.where(either > 0, both / np.where(either > 0, either, 1), np.nan)

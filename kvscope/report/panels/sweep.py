"""Parameter sweep: the effect of one parameter of a policy, of which several values were replayed or tuned."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from kvscope.core.json import Json, JsonDict
from kvscope.report.panel import panel
from kvscope.report.runs import RunView
from kvscope.report.source import ReportInput

FEWEST = 3  # values that make a sweep


@panel(
    "sweep",
    title="Sweep",
    order=22,
    help="Each line is one policy at one budget over the values of one of its parameters, everything else being "
    "equal: for A2SF's forgetting factor alpha, 0 is attention of the last step alone and 1 is the plain sum of H2O. "
    "A flat line means that the parameter has no effect here, a peak inside the range that tuning helps. For a tuned "
    "run, a map shows the value of each layer or head.",
)
def sweep(source: ReportInput) -> JsonDict | None:
    """Return policies with at least three values of a numeric parameter, all else equal, and tuned values.

    None if there is neither.
    """
    lines: dict[tuple[str, ...], list[tuple[float, RunView]]] = defaultdict(list)
    for run in source.runs:
        params = run.info.params
        for name, value in params.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest = json.dumps({key: params[key] for key in sorted(params) if key != name}, default=str)
                same = (run.info.policy, name, rest, str(run.budget), run.source, *run.protocol, run.phase)
                lines[same].append((float(value), run))
    sweeps: dict[tuple[str, str], list[JsonDict]] = defaultdict(list)
    for (policy, name, *_), found in lines.items():
        if len({value for value, _ in found}) >= FEWEST:
            ordered = sorted(found, key=lambda each: each[0])
            sweeps[policy, name].append({"values": [v for v, _ in ordered], "runs": [run.id for _, run in ordered]})
    made: list[JsonDict] = [
        {"policy": policy, "parameter": name, "lines": lines} for (policy, name), lines in sweeps.items()
    ]
    tuned = [each for run in source.runs for each in _tuned(run)]
    return {"sweeps": made, "tuned": tuned} if made or tuned else None


def _tuned(run: RunView) -> Iterator[JsonDict]:
    """Yield for each parameter that a tuned run varies its value in every layer or every head, ``[L, 1 | G]``.

    All budgets of one tuned file have the same values: only the first budget yields them.
    """
    params = run.info.params  # of a tuned policy: its settings, and the number of that of each head
    settings = cast("Sequence[Mapping[str, Json]] | None", params.get("settings"))
    choice = cast("Sequence[Sequence[int]] | None", params.get("choice"))
    budgets = [each.budget for each in run.replay.info.runs if each.label == run.info.label]
    if not settings or not choice or run.info.budget != budgets[0]:
        return
    for name in sorted(set().union(*settings)):
        values = [[settings[at].get(name) for at in heads] for heads in choice]
        if len({value for setting in settings if (value := setting.get(name)) is not None}) > 1:
            yield {
                "run": run.id,
                "parameter": name,
                "layers": cast("Sequence[int]", params["layers"]),
                "values": values,
            }

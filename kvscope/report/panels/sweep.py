"""Parameter sweep: what one parameter of a policy does, where several of its values were replayed."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from kvscope.report.panel import panel
from kvscope.report.runs import Run
from kvscope.report.source import ReportInput

FEWEST = 3  # values that make a sweep


@panel(
    "sweep",
    title="Sweep",
    order=22,
    help="Each line is one policy at one budget over the values of one of its parameters, everything else being "
    "equal: for A2SF's forgetting factor alpha, 0 is attention of the last step alone and 1 is the plain sum of H2O. "
    "A flat line means that the parameter does not matter here, a peak inside the range that tuning pays.",
)
def sweep(source: ReportInput) -> dict[str, Any] | None:
    """Return policies of which at least three values of one number were replayed, all else equal; None without any."""
    lines: dict[tuple[str, ...], list[tuple[float, Run]]] = defaultdict(list)
    for run in source.runs:
        params = run.info.get("params") or {}
        for name, value in params.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest = json.dumps({key: params[key] for key in sorted(params) if key != name}, default=str)
                same = (str(run.info["policy"]), name, rest, str(run.budget), run.source, *run.protocol, run.phase)
                lines[same].append((float(value), run))
    sweeps: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for (policy, name, *_), found in lines.items():
        if len({value for value, _ in found}) >= FEWEST:
            ordered = sorted(found, key=lambda each: each[0])
            sweeps[policy, name].append({"values": [v for v, _ in ordered], "runs": [run.id for _, run in ordered]})
    made = [{"policy": policy, "parameter": name, "lines": lines} for (policy, name), lines in sweeps.items()]
    return {"sweeps": made} if made else None

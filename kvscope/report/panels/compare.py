"""Side by side: two or more replays, models or prompts, with what differs marked."""

from __future__ import annotations

from collections import defaultdict

from kvscope.core.json import Json, JsonDict
from kvscope.report.encoding import visible
from kvscope.report.panel import panel
from kvscope.report.runs import RunView
from kvscope.report.source import ReportInput
from kvscope.results.store import Replay

BEGIN = 80  # characters of a prompt that are shown


@panel(
    "compare",
    title="Side by side",
    order=12,
    help="The upper table has the facts of every replay; a row with ≠ differs. In the lower table, each row is one "
    "policy under one budget, with the chosen metric in each replay. A row has ≠ where the 95 % intervals do not "
    "overlap, or, without intervals, where the means differ in four decimals; ★ marks the best of a budget in its "
    "replay.",
)
def compare(source: ReportInput) -> JsonDict | None:
    """Return the facts of the replays, and the runs of one policy and budget in each; None for a single replay."""
    if len(source.replays) < 2:
        return None
    facts = [facts_of(source, replay) for replay in source.replays]
    names = list(dict.fromkeys(name for each in facts for name in each))
    rows: list[Json] = [
        {"name": name, "values": list(values), "differs": len(set(values)) > 1}
        for name in names
        if (values := [each.get(name) for each in facts])
    ]
    pairs = _pairs(source)
    alone = len(source.runs) - sum(len(found) for found in pairs.values() if len(found) > 1)
    several = [found for found in pairs.values() if len(found) > 1]
    notes = [f"{alone} of {len(source.runs)} runs have no counterpart in another replay."] if alone else []
    shown: list[Json] = [
        {"runs": [found.get(place) for place in range(len(source.replays))]} for found in several[: source.limits.rows]
    ]
    return {"facts": rows, "rows": shown, "notes": notes}


def facts_of(source: ReportInput, replay: Replay) -> dict[str, str]:
    """Return what a replay is of, by name."""
    info, trace = replay.info, replay.info.trace
    opened = source.trace_of(replay)
    prompts = sorted({one.prompt for one in trace.sequences})
    lengths = sorted({one.length for one in trace.sequences})
    found = {
        "model": trace.model or "unknown",
        "trace": trace.name,
        "identity of the trace": trace.identity[:12],
        "sequences": str(len(trace.sequences)),
        "tokens of the prompt": _range(prompts),
        "tokens of the text": _range(lengths),
        "layers": str(len(trace.layers)),
        "query heads": str(trace.heads),
        "key/value heads": str(trace.kv_heads),
        "prefill": str(info.prefill),
        "loop": info.loop,
        "policies": str(len({run.label for run in info.runs})),
        "budgets": ", ".join(dict.fromkeys(str(run.budget) for run in info.runs if run.budget is not None)) or "none",
        "kvscope": info.versions.get("kvscope", "unknown"),
    }
    if opened is not None:
        texts = opened.tokens(0).sort_values("position")["text"].tolist()[: trace.sequences[0].prompt]
        text = "".join(str(text) for text in texts)
        found["prompt"] = visible(text[:BEGIN]) + ("…" if len(text) > BEGIN else "")
    return found


def _pairs(source: ReportInput) -> dict[tuple[str, ...], dict[int, str]]:
    """Return policy and budget (and loop, where one replay has both) -> number of the replay -> id of the run."""
    loops: dict[int, set[str]] = defaultdict(set)
    for run in source.runs:
        loops[source.replays.index(run.replay)].add(run.protocol[1])
    both = any(len(found) > 1 for found in loops.values())
    pairs: dict[tuple[str, ...], dict[int, str]] = defaultdict(dict)
    for run in source.ranking:
        pairs[_key(run, both)].setdefault(source.replays.index(run.replay), run.id)
    return pairs


def _key(run: RunView, both: bool) -> tuple[str, ...]:
    return (run.label, str(run.budget), *([run.protocol[1]] if both else []))


def _range(values: list[int]) -> str:
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"

"""The page: the data of every panel, written as one HTML or JSON file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kvscope.core.errors import REPLAY_COMMAND, ResultError
from kvscope.core.json import Json, JsonDict
from kvscope.core.output import replace_file, require_free
from kvscope.core.progress import Progress
from kvscope.core.records import HeadCounts, SourceRef
from kvscope.core.summary_records import MetricSummary
from kvscope.core.version import __version__
from kvscope.report.encoding import rounded, visible, visible_everywhere
from kvscope.report.headline import headline
from kvscope.report.limits import Limits
from kvscope.report.panel import PANELS, Panel
from kvscope.report.parts import NamedSpan, Part, spread
from kvscope.report.runs import MetricFacts, RunView
from kvscope.report.source import ReportInput
from kvscope.report.template import document, inert_json
from kvscope.results.ranking import KINDS
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace


def report(
    replays: Sequence[Replay],
    traces: Mapping[str, Trace],
    output: Path,
    *,
    force: bool = False,
    title: str | None = None,
    limits: Limits | None = None,
    spans: Mapping[str, Sequence[NamedSpan]] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write one self-contained HTML page that shows replays, and return its path.

    The page loads nothing from the network. The same input gives the same bytes.

    Parameters
    ----------
    replays : sequence of Replay
        The replays to show, at least one.
    traces : mapping of str to Trace
        Their traces by identity, as far as they are available: ``{trace.identity: trace}``.
    output : Path
        File to write.
    force : bool
        Whether to replace an existing file.
    title : str, optional
        Heading of the page; the names of the replays by default.
    limits : Limits, optional
        How much data the page may contain.
    spans : mapping of str to sequence of NamedSpan, optional
        Spans to show beside those of the prompts, by ``identity/number`` of a trace and its sequence.
    progress : callable, optional
        Called after every panel with the completed share, from 0 to 1.

    Raises
    ------
    ResultError
        If there is no replay, or the file exists or cannot be written.
    """
    output = Path(output)
    _require_free(output, force)
    source = report_input(replays, traces, limits, spans)
    panels = ordered_panels()
    data = page_data(source, title, panels, progress)
    text = document(data, [each.script.read_text(encoding="utf-8") for each in panels])
    return write_bytes(output, text.encode("utf-8"), force)


def report_data(
    replays: Sequence[Replay],
    traces: Mapping[str, Trace],
    output: Path,
    *,
    force: bool = False,
    title: str | None = None,
    limits: Limits | None = None,
    spans: Mapping[str, Sequence[NamedSpan]] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the path of a JSON file with everything that `report` would show; parameters and errors are the same.

    Packed numbers are ``{"dtype", "shape", "data"}``: base64 of zlib of little-endian numbers. With ``low`` and
    ``high`` they are 65,535 even steps between these two, and 65535 stands for NaN.
    """
    output = Path(output)
    _require_free(output, force)
    data = page_data(report_input(replays, traces, limits, spans), title, progress=progress)
    return write_bytes(output, (inert_json(data) + "\n").encode("ascii"), force)


def report_input(
    replays: Sequence[Replay],
    traces: Mapping[str, Trace],
    limits: Limits | None = None,
    spans: Mapping[str, Sequence[NamedSpan]] | None = None,
) -> ReportInput:
    """Return the input of the panels.

    Raises
    ------
    ResultError
        If there is no replay.
    """
    if not replays:
        raise ResultError("no replay to report on", f"Make one: {REPLAY_COMMAND}")
    return ReportInput(tuple(replays), dict(traces), limits or Limits(), dict(spans or {}))


def ordered_panels() -> list[Panel]:
    """Return every registered panel in the order of the page."""
    return sorted((each for _, each in PANELS.items()), key=lambda each: (each.order, each.name))


def page_data(
    source: ReportInput,
    title: str | None = None,
    panels: Sequence[Panel] | None = None,
    progress: Progress | None = None,
) -> JsonDict:
    """Return everything the page shows as JSON data, without invisible characters."""
    selected = ordered_panels() if panels is None else panels
    fitting = [each for each in selected if each.needs <= source.offers]
    built = []
    for done, each in enumerate(fitting, 1):
        built.append(_panel_data(each, source))
        if progress is not None:
            progress(done / len(fitting))
    page: JsonDict = {
        "title": title or f"KV-cache eviction: {', '.join(source.names)}",
        "generator": f"kvscope {__version__}",
        "facts": _facts(source),
        "headline": headline(source),
        "labels": list(source.labels),
        "replays": list(source.names),
        "kinds": [{"name": name, "meaning": meaning} for name, meaning in KINDS.items()],
        "metrics": [_metric(each) for each in source.metric_facts()],
        "first": source.first.id,
        "runs": [_run(source, run) for run in source.ranking],
        "parts": {part.name: _part(source, part) for part in source.parts.values()},
        "notes": _notes(source, [each.title for each in selected if "trace" in each.needs - source.offers]),
        "panels": [each for each in built if each is not None],
    }
    return {visible(name): visible_everywhere(value) for name, value in page.items()}


def _panel_data(each: Panel, source: ReportInput) -> JsonDict | None:
    data = each.build(source)
    if data is None:
        return None
    notes = data.pop("notes", [])
    return {
        "name": each.name,
        "title": each.title,
        "help": each.help,
        "detail": each.detail,
        "notes": notes,
        "data": data,
    }


def _run(source: ReportInput, run: RunView) -> JsonDict:
    identity, loop, prefill = run.protocol
    return {
        "id": run.id,
        "name": source.name_of(run),
        "title": source.title_of(run),
        "label": run.label,
        "policy": str(run.info.policy),
        "budget": run.budget,
        "keys": rounded(run.budget_keys),
        "full": rounded(run.full_keys),
        "kind": run.kind,
        "marks": run.marks,
        "loop": loop,
        "prefill": prefill,
        "replay": run.source,
        "parts": [part.name for part in source.parts.values() if part.identity == identity],
        "values": {name: _value(value) for name, value in run.metrics.items()},
    }


def _metric(metric: MetricFacts) -> JsonDict:
    return {
        "name": metric.name,
        "title": metric.title,
        "direction": metric.direction,
        "range": metric.range,
        "summary": metric.summary,
    }


def _value(value: MetricSummary) -> list[float | None]:
    """Return mean, low, high and count."""
    return [rounded(value.mean), rounded(value.low), rounded(value.high), value.count]


def _part(source: ReportInput, part: Part) -> JsonDict:
    replay = next(each for each in source.replays if each.info.trace.identity == part.identity)
    trace = replay.info.trace
    own = {str(layer): _heads(trace.heads_of(layer)) for layer in source.layers_of(part)}
    return {
        "number": part.number,
        "prompt": part.prompt,
        "length": part.length,
        "tokens": part.tokens,
        "images": part.images,
        "layers": source.layers_of(part),
        "layer": spread(source.layers_of(part))[0],
        **_heads(HeadCounts(trace.heads, trace.kv_heads)),
        **({"own": own} if trace.layer_heads else {}),
    }


def _heads(own: HeadCounts) -> dict[str, Json]:
    """Return the number of query heads, and how many of them share a key/value head."""
    return {"heads": own.heads, "group": own.heads // own.kv_heads}


def _notes(source: ReportInput, missing: Sequence[str]) -> list[str]:
    """Return the notes on the panels of single tokens."""
    notes = []
    for name, replay in zip(source.names, source.replays, strict=True):
        if replay.info.trace.kind == "text":
            notes.append(f"{name} is a replay of plain text without a trace, so there is no token text.")
        elif source.trace_of(replay) is None:
            notes.append(f"Token texts and attention rows are missing: the trace of {name} was not found.")
    if missing:
        notes.append(f"Not shown without a trace: {', '.join(missing)}. Make the report where the trace is stored.")
    if source.omitted:
        total = len(source.parts) + source.omitted
        notes.append(
            f"Below, {len(source.parts)} of {total} sequences are shown; the numbers above are of all sequences."
        )
    return notes


def _facts(source: ReportInput) -> list[str]:
    """Return the line under the heading: models, sizes, protocol."""
    facts = []
    for replay in source.replays:
        trace = replay.info.trace
        sequences = trace.sequences
        lengths = sorted({sequence.length for sequence in sequences})
        prompts = sorted({sequence.prompt for sequence in sequences})
        facts += [
            f"model {trace.model or 'unknown'}",
            f"{len(trace.layers)} layers, {_head_facts(trace)}",
            f"{_count(len(sequences), 'sequence')} of {_span(lengths)} tokens, {_span(prompts)} of them prompt",
            f"{replay.info.prefill} prefill",
            f"{replay.info.loop} loop",
        ]
    return list(dict.fromkeys(facts))


def _head_facts(trace: SourceRef) -> str:
    """Return how many heads the layers have; where they differ, each pair of numbers."""
    pairs = [f"{own.heads} heads, {own.kv_heads} key/value heads" for own in map(trace.heads_of, trace.layers)]
    return " in some and ".join(dict.fromkeys(pairs)) + (" in others" if len(set(pairs)) > 1 else "")


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _require_free(output: Path, force: bool) -> None:
    if output.is_dir():
        raise ResultError(f"{output} is a folder", "Name a file: reports/NAME.html.")
    require_free(output, force=force)


def write_bytes(output: Path, content: bytes, force: bool) -> Path:
    """Write a page under another name, then rename it, so that an existing one is whole; raises ResultError."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, content, force=force)
    except OSError as error:
        raise ResultError(
            f"{output} cannot be written: {error.strerror or error}",
            "Choose a folder that is writable and has free space.",
        ) from error
    return output

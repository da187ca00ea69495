"""The page: data of every panel, and the one file that carries them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import kvscope.report.panels  # noqa: F401  registers the panels
from kvscope import __version__
from kvscope.errors import ResultError
from kvscope.report.encoding import visible_everywhere
from kvscope.report.panel import PANELS, Panel
from kvscope.report.source import Limits, ReportInput
from kvscope.report.template import document
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace

MISSING = {
    "trace": "Not shown: the trace behind this replay is not at hand. Build the report where the trace lies.",
    "summary": "Not shown: the replays have no summary.",
    "fidelity": "Not shown: the replays have no values per step.",
    "residency": "Not shown: the replays do not say which keys were held.",
}


def report(
    replays: Sequence[Replay],
    traces: Mapping[str, Trace],
    output: Path,
    *,
    force: bool = False,
    title: str | None = None,
    limits: Limits | None = None,
) -> Path:
    """Return the path of one self-contained HTML page that shows replays.

    The same input gives the same bytes. The page fetches nothing.

    Parameters
    ----------
    replays : sequence of Replay
        One or more.
    traces : mapping of str to Trace
        The traces they were made from, by identity, as far as they are at hand.
    output : Path
        File to write.
    force : bool
        Whether to replace an existing file.
    title : str, optional
        Heading of the page; the names of the replays by default.
    limits : Limits, optional
        How much the page may carry.

    Raises
    ------
    ResultError
        If there is no replay, or the file exists, or cannot be written.
    """
    output = Path(output)
    if not replays:
        raise ResultError("no replay to report on", "Make one first: kvscope replay --policy h2o")
    _require_free(output, force)
    source = ReportInput(tuple(replays), dict(traces), limits or Limits())
    panels = ordered_panels()
    text = document(page_data(source, title, panels), [each.script.read_text(encoding="utf-8") for each in panels])
    return _write(output, text.encode("utf-8"))


def ordered_panels() -> list[Panel]:
    """Return every registered panel in the order of the page."""
    return sorted((each for _, each in PANELS.items()), key=lambda each: (each.order, each.name))


def page_data(source: ReportInput, title: str | None = None, panels: Sequence[Panel] | None = None) -> dict[str, Any]:
    """Return everything the page shows as plain JSON-able data, every string of it safe to look at."""
    page = {
        "title": title or f"KV-cache eviction: {', '.join(source.names)}",
        "generator": f"kvscope {__version__}",
        "facts": _facts(source),
        "labels": list(dict.fromkeys(run.label for run in source.runs)),
        "panels": [_panel_data(each, source) for each in (ordered_panels() if panels is None else panels)],
    }
    return dict(visible_everywhere(page))


def _panel_data(each: Panel, source: ReportInput) -> dict[str, Any]:
    head = {"name": each.name, "title": each.title, "help": each.help}
    missing = sorted(each.needs - source.offers)
    if missing:
        return {**head, "data": None, "notes": [MISSING[name] for name in missing]}
    data = each.build(source)
    return {**head, "data": data, "notes": data.pop("notes", [])}


def _facts(source: ReportInput) -> list[str]:
    """Return the line under the heading: models, sizes, protocol."""
    facts = []
    for replay in source.replays:
        trace = replay.info["trace"]
        sequences = trace["sequences"]
        lengths = sorted({int(sequence["length"]) for sequence in sequences})
        prompts = sorted({int(sequence["prompt"]) for sequence in sequences})
        facts += [
            f"model {trace.get('model') or 'unknown'}",
            f"{len(trace['layers'])} layers, {trace['heads']} heads, {trace['kv_heads']} key/value heads",
            f"{_count(len(sequences), 'sequence')} of {_span(lengths)} tokens, {_span(prompts)} of them prompt",
            f"{replay.info.get('prefill', 'full')} prefill",
            f"{replay.info.get('loop', 'open')} loop",
        ]
    return list(dict.fromkeys(facts))


def _span(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _require_free(output: Path, force: bool) -> None:
    if output.is_dir():
        raise ResultError(f"{output} is a folder", "Name a file, for instance reports/NAME.html.")
    if output.exists() and not force:
        raise ResultError(f"{output} exists already", "Give another name, or replace it with --force.")


def _write(output: Path, content: bytes) -> Path:
    """Write under another name, then rename: a page that is there is whole."""
    unfinished = output.with_name(output.name + ".incomplete")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.write_bytes(content)
            unfinished.replace(output)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise ResultError(
            f"{output} cannot be written: {error.strerror or error}",
            "Choose a folder that you may write to and that has room.",
        ) from error
    return output

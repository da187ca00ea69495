"""Value norms against attention: keys with much attention and small values, and the reverse (figure of VATP)."""

from __future__ import annotations

from kvscope.core.json import JsonDict
from kvscope.report.encoding import packed_bytes, packed_halves
from kvscope.report.panel import panel
from kvscope.report.source import ReportInput


@panel(
    "norms",
    title="Value norms",
    order=80,
    needs=("trace",),
    detail=True,
    help="Each point is one key of the chosen layer and head: the attention that it received from all later queries "
    "against the L1 norm of its value, both on a logarithmic scale. Sinks are far to the right and low: all queries "
    "attend to them, but their values are small, which is why VATP (arXiv:2406.12335) multiplies the two.",
)
def norms(source: ReportInput) -> JsonDict | None:
    """Return for each readable layer the attention that each key received and the norm of its value, ``[G, T]``."""
    left = source.limits.key_bytes
    parts: JsonDict = {}
    notes: list[str] = []
    missing = 0
    for part in source.parts.values():
        trace = source.traces.get(part.identity)
        if trace is None or "value_l1" not in trace.stored:
            continue
        notes += [note for note in [source.unread(part)] if note]
        layers: JsonDict = {}
        for layer in source.readable[part.name]:
            received = packed_halves(source.attended(part, layer).received)
            norm = packed_halves(trace.value_norms(part.number, layer, "l1"))
            left -= packed_bytes(received) + packed_bytes(norm)
            if left < 0:
                missing += 1
            else:
                layers[str(layer)] = {"received": received, "norm": norm}
        parts[part.name] = layers
    if not parts:
        return None
    if missing:
        notes.append(f"{missing} layers are omitted to limit the size of the page; the trace has them.")
    return {"parts": parts, "notes": list(dict.fromkeys(notes))}

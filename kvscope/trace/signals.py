"""The error for a signal that a trace does not have, with the way to record or import it."""

from __future__ import annotations

from pathlib import Path

from kvscope.core.errors import TraceError
from kvscope.trace.record import TraceHeader
from kvscope.trace.schema import MAPS_AND_VECTORS, QKV, TOPK, VECTORS

REMEDIES = {
    "maps": "Record it again with kvscope trace, or import it with attention.",
    "value_l1": "Record it again with kvscope trace, or import it with value_l1 or values.",
    "value_l2": "Record it again with kvscope trace, or import it with value_l2 or values.",
    "key_l2": "Record it again with kvscope trace, or import it with key_l2 or keys.",
    "similarity": "Record it again with kvscope trace, or import it with keys.",
    "queries": "Record it again with kvscope trace, or import it with queries.",
    "hidden": "Record it again with --hidden.",
    "reconstruction": "Record it again with --reread.",
    "value_out_l1": "Record it again with --outputs.",
    "rotary": f"Record it again with --store {MAPS_AND_VECTORS} or {QKV}, from a model with a rotary embedding.",
    "token_kinds": "Record it again with kvscope trace, which stores what the tokenizer calls special.",
    TOPK: f"Record it again with --store {TOPK}.",
    **{
        f"vectors:{name}": f"Record it again with --store {MAPS_AND_VECTORS} or {QKV}, or import it with {name}."
        for name in VECTORS
    },
}


def remedy(header: TraceHeader, signal: str) -> str:
    """Return what to do about a signal that a trace with this header does not have."""
    if header.rows_from == "module":
        return "Use what needs rows alone, such as h2o and tova: of this model nothing else can be recorded."
    return REMEDIES.get(signal, "Import it with that array.")


def missing_signal(path: Path, header: TraceHeader, signal: str) -> TraceError:
    """Return the error for a signal that the trace at `path` does not have."""
    return TraceError(f"trace {path} does not hold {signal}", remedy(header, signal))

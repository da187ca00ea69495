"""Provenance: the sources of the numbers, and their approximations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath

from kvscope.core.json import JsonDict
from kvscope.core.json_records import plain
from kvscope.report.panel import panel
from kvscope.report.source import ReportInput
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace
from kvscope.trace.record import TraceHeader

OPEN_LOOP = (
    "Open loop: decisions are replayed from recorded full-cache attention. Within a layer this is exact; the effect of "
    "an eviction on the hidden states of later layers and tokens is not included."
)
CLOSED_LOOP = (
    "Closed loop: the model ran again on the same tokens with the policy in its attention. The text that it would have "
    "generated itself under the policy is not measured."
)
MIXED = (
    "This page shows policies of several kinds. Those that compress only the prompt hold more keys as the sequence "
    "grows, and those that read a part hold all keys: compare within a kind, or at equal keys held."
)
BOUNDS = "Bounds use the whole recording in advance: they limit what any policy can reach, and are no policies."
GENERATED = (
    "The model generated the continuation. Generated text is repetitive, which flatters every policy; force a given "
    "continuation to measure text as people write it."
)
FLOAT16 = (
    "Attention rows are recorded in 16 bit: weights below about 6e-8 are zero, others have three significant digits."
)
SINKS = "This model has learned sinks: recorded rows sum to less than one, and the sink takes the rest of every row."
MASS = (
    "Attention mass predicts the loss on ordinary text. It does not predict whether a fact that received no attention "
    "for hundreds of steps is retained."
)


@panel(
    "provenance",
    title="Provenance",
    order=90,
    needs=("summary",),
    help="Everything needed to reproduce these numbers: model, prompt, versions and command. The list of "
    "approximations states what the numbers do not include; read it before you quote one of them.",
)
def provenance(source: ReportInput) -> JsonDict:
    """Return the facts of every replay and trace, and their approximations."""
    traces = {replay.info.trace.identity: source.trace_of(replay) for replay in source.replays}
    absent = [
        name
        for name, replay in zip(source.names, source.replays, strict=True)
        if not source.trace_of(replay) and replay.info.trace.kind != "text"
    ]
    return {
        "sources": [
            *(_replay(name, replay) for name, replay in zip(source.names, source.replays, strict=True)),
            *(_trace(trace) for trace in traces.values() if trace is not None),
        ],
        "approximate": _approximate(source),
        "notes": [f"The trace of {name} was not found: model revision and prompts are unknown." for name in absent],
    }


def _replay(name: str, replay: Replay) -> JsonDict:
    info = replay.info
    trace = info.trace
    return {
        "kind": "replay",
        "name": name,
        "facts": _known(
            {
                "trace": trace.name,
                "trace identity": trace.identity,
                "model": trace.model,
                "prefill": info.prefill,
                "loop": info.loop,
                "runs": len(info.runs),
                "seconds": info.seconds,
                "device": info.device,
                "versions": _versions(info.versions),
                "command": info.command,
            }
        ),
        "prompts": _files([plain(text) for text in trace.texts]),
    }


def _trace(trace: Trace) -> JsonDict:
    header, model = trace.header, trace.header.model
    windows = sorted({window for window in header.sliding_window if window is not None})
    return {
        "kind": "trace",
        "name": trace.name,
        "facts": _known(
            {
                "identity": trace.identity,
                "source": header.source,
                "protocol": header.protocol,
                "model": model.id,
                "revision": model.revision,
                "dtype": model.dtype,
                "tokenizer": header.tokenizer,
                "device": header.device,
                "seed": header.seed,
                "sampling": _pairs(plain(header.sampling)),
                "recorded layers": _layers(header),
                "sliding windows": ", ".join(str(window) for window in windows),
                "soft cap": header.softcap,
                "stored": ", ".join(sorted(header.stored)),
                "recorded at": trace.record.created,
                "command": header.command,
                "versions": _versions(header.versions, trace.record.kvscope),
            }
        ),
        "prompts": _files([plain(prompt) for prompt in header.prompts]),
    }


def _files(texts: Sequence[Mapping[str, object]] | None) -> list[dict[str, str]]:
    """Return name and hash of prompts or texts; of an absolute path, the file name alone."""

    def name(text: Mapping[str, object]) -> str:
        file = PurePath(str(text.get("file") or "given text"))
        return file.name if file.is_absolute() else str(file)

    return [{"file": name(text), "sha256": str(text.get("sha256") or "")} for text in texts or []]


def _approximate(source: ReportInput) -> list[str]:
    found = []
    if any(run.protocol[1] == "open" for run in source.runs):
        found.append(OPEN_LOOP)
    if any(run.protocol[1] == "closed" for run in source.runs):
        found.append(CLOSED_LOOP)
    kinds = {run.kind for run in source.runs}
    if len(kinds - {"bound", "no eviction"}) > 1:
        found.append(MIXED)
    if "bound" in kinds:
        found.append(BOUNDS)
    headers = [trace.header for replay in source.replays if (trace := source.trace_of(replay)) is not None]
    if any(header.protocol == "generated" for header in headers):
        found.append(GENERATED)
    if any("maps" in header.stored for header in headers):
        found.append(FLOAT16)
    if any(header.learned_sinks for header in headers):
        found.append(SINKS)
    found += dict.fromkeys(line for replay in source.replays for line in replay.info.trace.approximate)
    if "retained_mass" in source.metrics:
        found.append(MASS)
    return found


def _known(facts: Mapping[str, object]) -> list[list[str]]:
    return [[name, str(value)] for name, value in facts.items() if value not in (None, "", [], {})]


def _versions(versions: Mapping[str, str], kvscope: str | None = None) -> str:
    """Return versions as text; old traces store that of kvscope apart from the others."""
    known = {**({} if kvscope is None else {"kvscope": kvscope}), **versions}
    return ", ".join(f"{name} {version}" for name, version in sorted(known.items()))


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in sorted(values.items()))


def _layers(header: TraceHeader) -> str:
    if len(header.layers) == header.n_layers:
        return f"all {header.n_layers}"
    recorded = ", ".join(str(layer) for layer in header.layers) + f" of {header.n_layers}"
    if not header.other_layers:
        return recorded
    kinds = ", ".join(sorted(set(header.other_layers.values())))
    return f"{recorded}; the others have no cache to evict ({kinds})"

"""``kvscope info``: what a trace or a replay holds, how large it is, and whether it is complete."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.completion import either_names
from kvscope.cli.options import Json, Quiet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvscope.core.json import JsonDict
    from kvscope.results.store import Replay
    from kvscope.trace.reader import TokenSequence, Trace
    from kvscope.trace.record import TraceHeader


@command("info", order=130)
@examples(
    "kvscope info",
    "kvscope info my-trace --verify",
)
def info(
    trace: Annotated[
        str | None,
        typer.Argument(
            metavar="TRACE",
            autocompletion=either_names,
            help="Trace: name under traces/, path or address (s3://, https://); or a replay. Default: the newest.",
            show_default=False,
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read every file and compare its checksum.")] = False,
    system: Annotated[
        bool, typer.Option("--system", help="Show versions, devices and the kernels in use instead of a trace.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a trace or a replay holds, its size, and whether it is complete."""
    from kvscope.cli import console, places
    from kvscope.core.errors import UsageError

    if system:
        if trace is not None or verify:
            raise UsageError(
                "--system cannot be combined with a trace or --verify", "Omit the trace and --verify, or omit --system."
            )
        show_system(as_json=json)
        return
    from kvscope.results.store import open_replay
    from kvscope.trace.reader import open_trace

    path, noun = places.find_either(trace, quiet=quiet)
    if noun == "replay":
        with console.working(f"reading {path}", quiet=quiet or not verify):
            whole = open_replay(path, verify=verify)
        show_replay(whole, as_json=json, verified=verify)
        return
    with console.working(f"reading {path}", quiet=quiet or not verify):
        opened = open_trace(path, verify=verify)
    show(opened, as_json=json, verified=verify)


def show_replay(replay: Replay, *, as_json: bool = False, verified: bool = False) -> None:
    """Print what a replay holds."""
    from kvscope.cli import console
    from kvscope.core.output import size

    info, stored = replay.info, sum(replay.info.sizes.values())
    labels = list(dict.fromkeys(run.label for run in info.runs))
    if as_json:
        facts = {"path": str(replay.path), "name": replay.name, "whole": True, "verified": verified, "bytes": stored}
        trace = {"name": info.trace.name, "identity": info.trace.identity}
        made = {"trace": trace, "loop": info.loop, "runs": len(info.runs), "policies": labels, "created": info.created}
        console.show_json({**facts, **made})
        return
    lines = [
        ("trace", f"{info.trace.name}, identity {info.trace.identity[:16]}"),
        ("runs", f"{len(info.runs)}, of {len(labels)} policies, {info.loop} loop"),
        ("policies", ", ".join(labels)),
        ("size", size(stored)),
        ("made", f"{info.created} by kvscope {info.versions.get('kvscope', 'unknown')}"),
        ("complete", _complete(verified)),
    ]
    console.show_pairs(lines, title=str(replay.path))


def _complete(verified: bool) -> str:
    return "yes, every checksum compared" if verified else "yes (sizes compared; --verify compares checksums)"


def show_system(*, as_json: bool = False) -> None:
    """Print versions, devices and the kernels in use."""
    from kvscope.cli import console
    from kvscope.kernels.system import system

    found = system()
    if as_json:
        console.show_json({"kind": "kvscope-system", "schema": 1, **found})
    else:
        console.show_pairs([(name, str(value)) for name, value in found.items()], title="system")


def show(trace: Trace, *, as_json: bool = False, verified: bool = False, said: bool = False) -> None:
    """Print what a trace holds, and with `said` what the model said."""
    from kvscope.cli import console
    from kvscope.cli.said import show_said, what_was_said

    texts = what_was_said(trace) if said else []
    if as_json:
        console.show_json({**describe(trace, verified=verified), **({"said": texts} if said else {})})
        return
    console.show_pairs(pairs(trace, verified=verified), title=str(trace.path))
    show_said(texts)


def describe(trace: Trace, *, verified: bool = False) -> JsonDict:
    """Return the facts about a trace as plain data."""
    from kvscope.core.json_records import plain
    from kvscope.trace.record_file import model_to_json

    header = trace.header
    return {
        "path": str(trace.path),
        "name": trace.name,
        "identity": trace.identity,
        "whole": True,
        "verified": verified,
        "model": model_to_json(header.model),
        "source": header.source,
        "protocol": header.protocol,
        "created": trace.record.created,
        "kvscope": header.versions.get("kvscope", "unknown"),
        "device": header.device,
        "seed": header.seed,
        "sampling": plain(header.sampling),
        "prompts": [plain(prompt) for prompt in header.prompts],
        "layers": list(trace.layers),
        "n_layers": header.n_layers,
        "other_layers": header.other_layers,
        "rows_from": header.rows_from,
        "heads": trace.heads,
        "kv_heads": trace.kv_heads,
        "head_dim": trace.head_dim,
        "layer_heads": [plain(own) for own in header.layer_heads],
        "layer_types": header.layer_types,
        "sliding_window": header.sliding_window,
        "chunk_size": header.chunk_size,
        "shared_cache": header.shared_cache,
        "latent_size": header.latent_size,
        "learned_sinks": header.learned_sinks,
        "sink_rows": header.sink_rows,
        "softcap": header.softcap,
        "sequences": [{"prompt": s.prompt, "length": s.length, "forced": s.forced} for s in trace.sequences],
        "images": [[plain(image) for image in s.images] for s in trace.record.sequences],
        "store": header.store,
        "stored": sorted(header.stored),
        "derived": sorted(header.derived),
        "top": header.top,
        "loss": {} if trace.storage_error is None else plain(trace.storage_error),
        "head_numbers": header.head_numbers,
        "n_heads": header.n_heads,
        "query_stride": header.query_stride,
        "approximate": trace.approximate,
        "bytes": _bytes(trace),
    }


def pairs(trace: Trace, *, verified: bool = False) -> list[tuple[str, str]]:
    """Return the facts about a trace as pairs of a name and a text."""
    from kvscope.core.output import size

    header, model = trace.header, trace.header.model
    layers, count = trace.layers, header.n_layers
    recorded = "all" if len(layers) == count else "layers " + ", ".join(map(str, layers))
    if header.other_layers:
        recorded += f"; {others(header.other_layers)}"
    if header.rows_from == "module":
        recorded += "; rows as the model's attention modules return them"
    windows = sorted({window for window in header.sliding_window if window is not None})
    made_by = header.versions.get("kvscope", "unknown")
    lines = [
        ("model", " ".join(str(part) for part in (model.id or "unknown", model.revision) if part)),
        ("shape", _shape(header)),
        ("recorded", recorded),
        ("sequences", _sequences(trace.sequences)),
        ("continuation", _PROTOCOLS[header.protocol]),
        ("store", header.store if header.top is None else f"{header.store}:{header.top}"),
        ("stored", ", ".join(sorted(header.stored))),
        ("size", size(_bytes(trace))),
        ("made", f"{trace.record.created} by kvscope {made_by} on {header.device or 'an unknown device'}"),
        ("complete", _complete(verified)),
        ("identity", trace.identity[:16]),
    ]
    if header.derived:
        lines.insert(7, ("recomputed", ", ".join(sorted(header.derived))))
    lines += [("approximate", sentence) for sentence in trace.approximate]
    images = sum(len(item.images) for item in trace.record.sequences)
    if images:
        tokens = sum(image.tokens for item in trace.record.sequences for image in item.images)
        lines.insert(4, ("images", f"{images} in the prompts, {tokens} tokens"))
    if windows:
        lines.insert(2, ("sliding windows", ", ".join(map(str, windows))))
    chunks = sorted({chunk for chunk in header.chunk_size if chunk is not None})
    if chunks:
        lines.insert(2, ("attends in chunks of", ", ".join(map(str, chunks))))
    if header.learned_sinks:
        lines.insert(2, ("learned sinks", "yes: the sinks' share is taken from the rows, which do not sum to one"))
    if header.sink_rows == "before":
        lines.insert(2, ("learned sinks", "yes: the sinks' share is not taken from the rows, which sum to one"))
    if header.softcap is not None:
        lines.insert(2, ("soft cap", f"{header.softcap:g}"))
    return lines


def others(kinds: Mapping[str, str]) -> str:
    """Return which layers have no cache to evict: ``no cache to evict in 0, 1 (linear_attention)``."""
    by_kind: dict[str, list[str]] = {}
    for layer, kind in kinds.items():
        by_kind.setdefault(kind, []).append(layer)
    return "no cache to evict in " + ", ".join(f"{', '.join(of)} ({kind})" for kind, of in by_kind.items())


_PROTOCOLS = {"generated": "generated by the model", "forced": "forced to a given text", "import": "imported"}


def _bytes(trace: Trace) -> int:
    return sum(file.stat().st_size for file in trace.path.rglob("*") if file.is_file())


def _shape(header: TraceHeader) -> str:
    """Return how many layers there are, and their heads."""
    from kvscope.trace.layer_records import heads_text

    heads = heads_text({layer: header.heads_of(layer) for layer in header.layers})
    return f"{header.n_layers} layers{'; ' if header.layer_heads else ', '}{heads}"


def _sequences(sequences: Sequence[TokenSequence]) -> str:
    shown = [f"{item.prompt} + {item.length - item.prompt}" for item in sequences[:4]]
    more = f"; {len(sequences) - 4} more sequences" if len(sequences) > 4 else ""
    return f"{len(sequences)} of prompt + continuation: {', '.join(shown)} tokens{more}"

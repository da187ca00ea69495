"""``kvscope info``: what is in a trace, how large it is, and whether it is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvscope.cli.options import Json, Quiet

if TYPE_CHECKING:
    from kvscope.trace.reader import Trace


def info(
    trace: Annotated[
        str | None,
        typer.Argument(
            metavar="[TRACE]", help="Name under traces/, or a path. Default: the newest.", show_default=False
        ),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Also read every file and compare its checksum.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what a trace holds, its size, and whether it is whole."""
    from kvscope.cli import console, places
    from kvscope.trace.reader import open_trace

    path = places.find_trace(trace, quiet=quiet)
    with console.working(f"reading {path}", quiet=quiet or not verify):
        opened = open_trace(path, verify=verify)
    show(opened, as_json=json, verified=verify)


def show(trace: Trace, *, as_json: bool = False, verified: bool = False) -> None:
    """Print what a trace holds."""
    from kvscope.cli import console

    facts = describe(trace, verified=verified)
    if as_json:
        console.show_json(facts)
    else:
        console.show_pairs(pairs(facts), title=facts["path"])


def describe(trace: Trace, *, verified: bool = False) -> dict[str, Any]:
    """Return the facts about a trace as plain data."""
    header = trace.header
    return {
        "path": str(trace.path),
        "name": trace.name,
        "identity": trace.identity,
        "whole": True,
        "verified": verified,
        "model": header.model,
        "source": header.source,
        "protocol": header.protocol,
        "created": trace.data["created"],
        "kvscope": trace.data["kvscope"],
        "device": header.device,
        "seed": header.seed,
        "sampling": header.sampling,
        "prompts": header.prompts,
        "layers": list(trace.layers),
        "n_layers": header.n_layers,
        "heads": trace.heads,
        "kv_heads": trace.kv_heads,
        "head_dim": trace.head_dim,
        "layer_types": header.layer_types,
        "sliding_window": header.sliding_window,
        "learned_sinks": header.learned_sinks,
        "softcap": header.softcap,
        "sequences": [{"prompt": s.prompt, "length": s.length, "forced": s.forced} for s in trace.sequences],
        "stored": sorted(trace.stored),
        "bytes": sum(file.stat().st_size for file in trace.path.rglob("*") if file.is_file()),
    }


def pairs(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the facts as lines of a name and a text."""
    from kvscope.cli.console import size

    model = facts["model"]
    layers, count = facts["layers"], facts["n_layers"]
    recorded = "all" if len(layers) == count else "layers " + ", ".join(map(str, layers))
    windows = sorted({window for window in facts["sliding_window"] if window is not None})
    whole = "yes, every checksum compared" if facts["verified"] else "yes (sizes compared; --verify compares checksums)"
    lines = [
        (
            "model",
            " ".join(str(part) for part in (model.get("id") or "unknown", model.get("revision")) if part),
        ),
        (
            "shape",
            f"{count} layers, {facts['heads']} query heads, {facts['kv_heads']} key/value heads of size {facts['head_dim']}",
        ),
        ("recorded", recorded),
        ("sequences", _sequences(facts["sequences"])),
        (
            "tokens after the prompt",
            {"generated": "generated", "forced": "forced from a file", "import": "imported"}.get(
                facts["protocol"], facts["protocol"]
            ),
        ),
        ("stored", ", ".join(facts["stored"])),
        ("size", size(facts["bytes"])),
        (
            "made",
            f"{facts['created']} by kvscope {facts['kvscope']} on {facts['device'] or 'another machine'}",
        ),
        ("whole", whole),
        ("identity", facts["identity"][:16]),
    ]
    if windows:
        lines.insert(2, ("sliding windows", ", ".join(map(str, windows))))
    if facts["learned_sinks"]:
        lines.insert(2, ("learned sinks", "yes: rows do not sum to one"))
    if facts["softcap"] is not None:
        lines.insert(2, ("soft cap", f"{facts['softcap']:g}"))
    return lines


def _sequences(sequences: list[dict[str, Any]]) -> str:
    shown = [f"{item['prompt']} + {item['length'] - item['prompt']}" for item in sequences[:4]]
    more = f" and {len(sequences) - 4} more" if len(sequences) > 4 else ""
    return f"{len(sequences)} of prompt + continuation: {', '.join(shown)}{more} tokens"

"""A trace in one line and as a table of a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from kvscope.core.counts import count
from kvscope.trace.record import TraceHeader

Sizes = Sequence[tuple[int, int]]  # of each sequence: tokens of its prompt, and of all


def line(path: Path, header: TraceHeader, sizes: Sizes) -> str:
    """Return where a trace is, its model, number and lengths of its sequences, and its heads."""
    lengths = [length for _, length in sizes]
    tokens = f"{lengths[0]}" if len(set(lengths)) == 1 else f"{min(lengths)} to {max(lengths)}"
    heads = f"{count(len(header.layers), 'layer')} of {header.heads} heads ({header.kv_heads} key/value)"
    return f"Trace {path}: {header.model.id}, {count(len(lengths), 'sequence')} of {tokens} tokens, {heads}"


def html(path: Path, header: TraceHeader, sizes: Sizes) -> str:
    """Return the line, and a table of the lengths of prompts and generated texts."""
    rows = [(number, prompt, length - prompt) for number, (prompt, length) in enumerate(sizes)]
    head = "".join(f"<th>{name}</th>" for name in ("sequence", "prompt", "generated"))
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<p>{escape(line(path, header, sizes))}</p><table><tr>{head}</tr>{body}</table>"

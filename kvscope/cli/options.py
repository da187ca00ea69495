"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
Device = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:1, mps, auto.")]


def command_line(ctx: typer.Context) -> str:
    """Return the command as it was typed, for the provenance of what it writes."""
    import shlex

    return shlex.join(["kvscope", *ctx.find_root().obj])

"""``kvscope heads``: which heads retrieve a fact, as the file that duo-attention and headkv read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.options import Force, Json, NoVerify, Quiet, TraceNames

SHOWN = 10  # heads that are listed


@command("heads", order=85)
@examples(
    "kvscope heads needles -o heads.tsv",
    "kvscope heads my-trace --span fact=text:583 -o heads.json",
)
def heads(
    traces: TraceNames = None,
    span: Annotated[
        list[str] | None,
        typer.Option(
            "--span",
            "-s",
            metavar="NAME[=WHAT]",
            help="Name the needle: a span of the prompts, fact=text:WORDS, or fact=120:140 (140 excluded). "
            "Repeatable. Default: needle, the name in prompts of kvscope tasks.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Write to this file, .tsv or .json.")
    ] = Path("heads.tsv"),
    force: Force = False,
    no_verify: NoVerify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score the heads by how much they attend to a needle, and write the scores for duo-attention and headkv.

    The score of a head is its attention mass on the needle, in the rows that produce the answer. Use the file as a
    parameter: duo-attention:heads=heads.tsv, headkv:heads=heads.tsv.
    """
    from kvscope.analysis.head_scores import as_json, as_table, head_scores
    from kvscope.cli import console, places
    from kvscope.core.errors import UsageError
    from kvscope.core.output import replace_file, require_free
    from kvscope.trace.reader import open_trace

    if output.suffix not in (".tsv", ".json"):
        raise UsageError(f"{output} is neither .tsv nor .json", "Example: -o heads.tsv")
    require_free(output, force=force)
    named: list[str | None] = [*traces] if traces else [None]
    opened = [open_trace(places.find_trace(name, quiet=quiet), compare=not no_verify) for name in named]
    count = sum(len(trace.sequences) for trace in opened)
    with console.bar("reading", count, "sequences", quiet=quiet) as update:
        scores = head_scores(opened, span or (), lambda share: update(round(share * count), ""))
    replace_file(output, (as_json if output.suffix == ".json" else as_table)(scores).encode(), force=force)
    order = sorted(((float(scores[place]), *place) for place in _places(scores.shape)), reverse=True)
    if json:
        console.show_json(
            {"file": str(output), "heads": [{"layer": at, "head": head, "score": one} for one, at, head in order]}
        )
        return
    best = ", ".join(f"{layer}.{head} ({score:.2f})" for score, layer, head in order[:SHOWN])
    console.show_pairs(
        [
            ("file", str(output)),
            ("heads", f"{scores.shape[0]} layers x {scores.shape[1]}, {count} sequence{'s' * (count != 1)}"),
            ("highest", f"{best}  (layer.head, attention mass on the needle)"),
            ("mean", f"{scores.mean():.3f}"),
        ]
    )


def _places(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    return [(layer, head) for layer in range(shape[0]) for head in range(shape[1])]

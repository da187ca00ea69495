"""``kvscope import``: make a trace of attention maps captured elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.options import Force, Json, Quiet, TraceOutput

Maps = Annotated[
    Path,
    typer.Argument(
        metavar="MAPS",
        help="Read attention [L, H, T, T] or [S, L, H, T, T], or attentions in the form of transformers, from this "
        ".npz, .npy, .safetensors or .pt file.",
        show_default=False,
    ),
]
PromptStored = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="Store this prompt: a text, or a file that contains it.")
]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        "--prompt-length",
        help="Number of tokens of the prompt, padding included. Without it, replays need --prefill stream.",
        min=1,
    ),
]
Axes = Annotated[
    str | None,
    typer.Option(
        "--axes",
        metavar="LETTERS",
        help="Name the axes of attention: LBHTT has L layers, B sequences, H heads, T queries, T keys.",
        show_default=False,
    ),
]
KvHeads = Annotated[
    int | None,
    typer.Option(
        "--kv-heads",
        help="Number of key/value heads of a layer. Default: as in keys and values, or the number of query heads.",
        show_default=False,
        min=1,
    ),
]
LearnedSinks = Annotated[
    bool,
    typer.Option("--learned-sinks", help="The model has learned sinks: rows may sum to less than one."),
]


@command("import", order=160)
@examples(
    "kvscope import maps.npz --prompt-length 512",
    "kvscope import attentions.pt --axes LBHTT --prompt prompt.txt",
)
def import_maps(
    maps: Maps,
    prompt: PromptStored = None,
    prompt_length: PromptTokens = None,
    axes: Axes = None,
    kv_heads: KvHeads = None,
    learned_sinks: LearnedSinks = False,
    output: TraceOutput = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a trace from attention maps; every row is checked first.

    Optional arrays: value_l1, value_l2, key_l2 [L, G, T]; keys, values, queries [L, G or H, T, D]; sink_mass [L, H, T],
    the share that a learned sink takes of rows that sum to one; tokens; prompt_length; attention_mask, whose padding is
    removed. The command prints its assumptions and stores them in the trace.
    """
    from kvscope.cli import console, places
    from kvscope.cli.hints import next_command
    from kvscope.cli.info import show
    from kvscope.trace.importer import import_maps as convert

    path = places.place(places.TRACES, output, maps.stem, force=force)
    with console.working(f"importing {maps}", quiet=quiet):
        made = convert(
            maps,
            prompt,
            path,
            prompt_length=prompt_length,
            axes=axes,
            kv_heads=kv_heads,
            learned_sinks=learned_sinks,
            force=force,
        )
    for line in made.header.assumed:
        console.note(f"assumed: {line}", quiet=quiet)
    show(made, as_json=json)
    console.note(next_command(made), quiet=quiet)

"""``kvscope gate scorers``: train the scorers of the policy kvzap."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvscope.cli.command import examples
from kvscope.cli.completion import trace_names
from kvscope.cli.gate import app, require_free
from kvscope.cli.options import Force, Json, NoVerify, Quiet
from kvscope.cli.typer_classes import HelpCommand
from kvscope.core.gate_options import ScorerSettings


@app.command("scorers", cls=HelpCommand)
@examples(
    "kvscope gate scorers my-trace -o scorers.safetensors",
    "kvscope gate scorers first-trace second-trace --width 0",
)
def scorers(
    traces: Annotated[
        list[str],
        typer.Argument(
            metavar="TRACE",
            autocompletion=trace_names,
            help="Trace with hidden states and second readings. Repeatable.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Write the scorers to this file.")] = (
        Path("scorers.safetensors")
    ),
    scorer_width: Annotated[
        int, typer.Option("--width", help="Size of the hidden layer; 0 trains a linear scorer.", min=0)
    ] = 512,
    tokens: Annotated[int, typer.Option("--tokens", help="Train on this many tokens of each prompt.", min=1)] = 500,
    epochs: Annotated[int, typer.Option("--epochs", help="Train for this many passes over the tokens.", min=1)] = 15,
    rate: Annotated[float, typer.Option("--rate", help="Initial learning rate; it decays to zero.")] = 0.005,
    seed: Annotated[int, typer.Option("--seed", help="Seed of all random numbers.")] = 0,
    force: Force = False,
    no_verify: NoVerify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the scorers of the policy kvzap on prompts that the model read twice; the model does not run.

    Record the traces with --hidden and --reread. A scorer predicts the logarithm of the kvzip score of a key.
    """
    from kvscope.cli import console
    from kvscope.cli.hints import replay_of
    from kvscope.cli.places import find_trace

    settings = ScorerSettings(scorer_width, tokens, epochs, rate=rate, seed=seed)
    require_free(output, force)
    with console.working("loading torch", quiet=quiet):
        from kvscope.trace.reader import open_trace
        from kvscope.training.scorers import train_scorers

    opened = [open_trace(find_trace(name, quiet=quiet), compare=not no_verify) for name in traces]
    with console.bar("training scorers", opened[0].header.n_layers, "layers", quiet=quiet) as update:
        made = train_scorers(opened, output, settings, lambda layer: update(layer, ""))
    facts = made.scorers.facts
    if json:
        console.show_json({"file": str(output), "model": facts.model, "width": facts.width, **facts.provenance})
    else:
        kind = f"hidden layer of {scorer_width}" if scorer_width else "linear"
        console.show_pairs(
            [
                ("model", facts.model),
                ("scorers", f"{facts.layers} layers, {facts.kv_heads} key/value heads, {kind}"),
                ("prompts", f"{facts.provenance['prompts']}, every fifth held out"),
                ("rank correlation by layer", ", ".join(f"{one:.2f}" for one in made.rank)),
                ("variance explained by layer", ", ".join(f"{one:.0%}" for one in made.explained)),
            ],
            title=str(output),
        )
    console.note(f"next: {replay_of(f'kvzap:scorers={output}', traces)}", quiet=quiet)

"""``kvscope gate``: learned gates that say which keys are worth keeping."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvscope.cli.command import command_group
from kvscope.cli.options import Device, Force, Json, Quiet

if TYPE_CHECKING:
    from kvscope.training.fit import Look
    from kvscope.training.train_gate import Trained

app = command_group(
    "gate",
    order=150,
    help="Train gates for attention-gate: small modules that say, at each layer, which keys are worth keeping.",
)


class EvictionLoss(StrEnum):
    """How keeping more than the target is counted."""

    one_sided = "one-sided"
    absolute = "absolute"
    square = "square"


class Form(StrEnum):
    """What a token's gate looks at."""

    causal = "causal"
    bidirectional = "bidirectional"


@app.callback()
def gates() -> None:
    """Train gates for attention-gate: small modules that say, at each layer, which keys are worth keeping."""


@app.command("train")
def train(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="As in kvscope trace. Needed with --text.", show_default=False)
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="UTF-8 text that the model reads through the gates. Repeatable."),
    ] = None,
    distill: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TRACE",
            help="Learn from recorded attention what is worth keeping, without the model. Repeatable.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Where the gate goes.")] = Path(
        "gate.safetensors"
    ),
    target_keep: Annotated[float, typer.Option(help="Share of keys that should stay.")] = 0.5,
    eviction_loss: Annotated[
        EvictionLoss,
        typer.Option(
            metavar="FORM", help="Of the distance x to the target: one-sided, max(0, x); absolute, |x|; or square."
        ),
    ] = EvictionLoss.square,
    strength: Annotated[float, typer.Option(help="Of the eviction loss beside the other.")] = 40.0,
    form: Annotated[
        Form, typer.Option(help="A gate looks back, or the gates of a prompt look at all of it.")
    ] = Form.causal,
    heads: Annotated[int, typer.Option(help="Heads of the gate's own attention.", min=1)] = 2,
    head_size: Annotated[int, typer.Option(help="Size of one.", min=1)] = 16,
    tau: Annotated[float, typer.Option(help="A key stays if its gate, 0 to 1, is above this.")] = 0.5,
    sinks: Annotated[int, typer.Option(help="First tokens that always stay.", min=0)] = 0,
    window: Annotated[int, typer.Option(metavar="TOKENS", help="With --text: of one sequence.", min=2)] = 256,
    tokens: Annotated[int, typer.Option(help="With --text: of one step.", min=2)] = 2048,
    steps: Annotated[int, typer.Option(help="At most.", min=1)] = 400,
    rate: Annotated[float, typer.Option(help="Learning rate, which falls to zero.")] = 0.003,
    every: Annotated[int, typer.Option(help="Steps between two checkpoints, which judge the gate too.", min=1)] = 25,
    patience: Annotated[int, typer.Option(help="Checkpoints without a better gate until it stops.", min=1)] = 6,
    ramp: Annotated[float, typer.Option(help="Share of the steps over which the target falls from all keys.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint beside the output.")] = False,
    dtype: Annotated[str, typer.Option(help="Of the model: auto, float32, float16, bfloat16.")] = "auto",
    device: Device = "cpu",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train gates on texts, or on recorded attention; the model itself stays as it is.

    With --text the model reads through the gates: its loss, and an eviction loss that pulls the share of keys that stay
    to the target. With --distill nothing of the model runs: gates learn which keys later queries looked at most.
    """
    from kvscope.cli import console, places
    from kvscope.core.errors import UsageError
    from kvscope.core.output import require_free

    if bool(text) == bool(distill):
        raise UsageError("name either texts or traces", "Write --model M --text FILE, or --distill TRACE")
    if text and model is None:
        raise UsageError("--text needs a model", "Name it: --model demo")
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UsageError(f"{output} cannot be a file here", "Name a file in a folder that exists: -o gate.safetensors")
    require_free(output, force=force)
    with console.working("loading transformers", quiet=quiet):
        from kvscope.trace.reader import open_trace
        from kvscope.training.fit import Settings
        from kvscope.training.train_gate import Design, train_on_texts, train_on_traces

    design = Design(heads, head_size, form.value, tau, sinks)
    settings = Settings(target_keep, eviction_loss.value, strength, steps, rate, every, patience, ramp)
    common: dict[str, Any] = {"design": design, "settings": settings, "seed": seed, "device": device, "resume": resume}
    with console.bar("training gates", steps, "steps", quiet=quiet) as update:

        def moved(step: int, look: Look) -> None:
            update(step, f"loss {look.loss:.3f}, keeps {look.keep:.0%}")

        if distill:
            traces = [open_trace(places.find_trace(name, quiet=quiet)) for name in distill]
            made = train_on_traces(traces, output, progress=moved, **common)
        else:
            made = train_on_texts(
                str(model),
                text or [],
                output,
                window=window,
                tokens=tokens,
                dtype=dtype,
                revision=revision,
                progress=moved,
                **common,
            )
    _show(made, as_json=json)
    console.note(f"next: kvscope replay --policy attention-gate:gate={output}", quiet=quiet)


def _show(made: Trained, *, as_json: bool) -> None:
    from dataclasses import asdict

    from kvscope.cli.console import show_json, show_pairs

    first, best = made.log[0], made.best
    if as_json:
        looks = [asdict(look) for look in made.log]
        show_json({"file": str(made.path), "facts": asdict(made.facts), "best": asdict(best), "log": looks})
        return
    target = made.facts.provenance["target_keep"]
    show_pairs(
        [
            ("model", made.facts.model),
            ("keys that stay", f"{best.keep:.1%} of those held out (target {target:.0%})"),
            ("by layer", ", ".join(f"{share:.0%}" for share in best.by_layer)),
            ("loss", f"{best.loss:.3f}; before training {first.loss:.3f}, with {first.keep:.0%} of the keys"),
            ("steps", f"{made.log[-1].step}, the best after {best.step}"),
            ("size", f"{made.path.stat().st_size / 1000:.0f} kB"),
        ],
        title=str(made.path),
    )

"""``kvscope gate``: train learned gates, which decide which keys to retain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command_group, examples
from kvscope.cli.completion import trace_names
from kvscope.cli.options import Device, Dtype, Force, Json, NoVerify, Quiet, Revision
from kvscope.cli.typer_classes import HelpCommand
from kvscope.core.gate_options import EvictionLoss, GateDesign, GateForm, TextWindows, TrainingSettings
from kvscope.core.options import ModelSource

if TYPE_CHECKING:
    from kvscope.training.fit import Evaluation
    from kvscope.training.train_gate import Trained

app = command_group(
    "gate",
    order=150,
    help="Train gates for attention-gate, compute filters for q-filters, or scorers for kvzap.",
)


GateModel = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="Load demo, an alias, a Hub id, or a folder. Required with --text.", show_default=False
    ),
]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        "--text", metavar="FILE", help="Train on this UTF-8 text, which the model reads through the gates. Repeatable."
    ),
]
Distill = Annotated[
    list[str] | None,
    typer.Option(
        "--distill",
        metavar="TRACE",
        autocompletion=trace_names,
        help="Train on the attention of this trace, without the model. Repeatable.",
    ),
]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Write the gate to this file.")]
TargetKeep = Annotated[float, typer.Option("--target-keep", help="Retain this share of the keys.")]
Eviction = Annotated[
    EvictionLoss,
    typer.Option(
        "--eviction-loss",
        metavar="FORM",
        help="Penalise the distance x to the target: one-sided, max(0, x); absolute, |x|; or square.",
    ),
]
Strength = Annotated[float, typer.Option("--strength", help="Weight of the eviction loss.")]
Form = Annotated[
    GateForm,
    typer.Option(
        "--form",
        help="Let a gate attend to earlier tokens only (causal), or in a prompt to all of its tokens (bidirectional).",
    ),
]
Heads = Annotated[int, typer.Option("--heads", help="Number of attention heads in a gate.", min=1)]
HeadSize = Annotated[int, typer.Option("--head-size", help="Size of each of these heads.", min=1)]
Tau = Annotated[float, typer.Option("--tau", help="Retain a key if its gate, 0 to 1, is above this.")]
Sinks = Annotated[int, typer.Option("--sinks", help="Always retain the first N tokens.", min=0)]
Window = Annotated[
    int, typer.Option("--window", metavar="TOKENS", help="With --text: read sequences of this length.", min=2)
]
Tokens = Annotated[int, typer.Option("--tokens", help="With --text: read this many tokens per step.", min=2)]
Steps = Annotated[int, typer.Option("--steps", help="Train for at most this many steps.", min=1)]
Rate = Annotated[float, typer.Option("--rate", help="Initial learning rate; it decays to zero.")]
Every = Annotated[int, typer.Option("--every", help="Evaluate the gate and write a checkpoint every N steps.", min=1)]
Patience = Annotated[int, typer.Option("--patience", help="Stop after N checkpoints without improvement.", min=1)]
Ramp = Annotated[float, typer.Option("--ramp", help="Lower the target from 100 % over this share of the steps.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all random numbers.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint next to the output.")]


@app.callback()
def gates() -> None:
    """Train gates for attention-gate, compute filters for q-filters, or scorers for kvzap."""


@app.command("filters", cls=HelpCommand)
@examples(
    "kvscope gate filters my-trace -o filters.safetensors",
    "kvscope gate filters first-trace second-trace -o filters.safetensors",
)
def filters(
    traces: Annotated[
        list[str], typer.Argument(metavar="TRACE", autocompletion=trace_names, help="Trace with vectors. Repeatable.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Write the filters to this file.")] = (
        Path("filters.safetensors")
    ),
    force: Force = False,
    no_verify: NoVerify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compute the filters of the policy q-filters from the queries of traces of one model."""
    from kvscope.cli import console
    from kvscope.cli.hints import replay_of
    from kvscope.cli.places import find_trace

    require_free(output, force)
    with console.working("reading queries", quiet=quiet):
        from kvscope.trace.reader import open_trace
        from kvscope.training.filters import filters_of

        made = filters_of([open_trace(find_trace(name, quiet=quiet), compare=not no_verify) for name in traces])
    made.write(output)
    facts = made.facts
    if json:
        console.show_json({"file": str(output), "model": facts.model, **facts.provenance})
    else:
        sizes = f"{facts.layers} layers, {facts.kv_heads} key/value heads of size {facts.size}"
        queries = f"{facts.provenance['queries']} tokens of {len(traces)} trace{'s' * (len(traces) > 1)}"
        console.show_pairs([("model", facts.model), ("filters", sizes), ("from", queries)], title=str(output))
    console.note(f"next: {replay_of(f'q-filters:filters={output}', traces)}", quiet=quiet)


@app.command("train", cls=HelpCommand)
@examples(
    "kvscope gate train --model demo --text book.txt -o gate.safetensors",
    "kvscope gate train -m demo --text book.txt --steps 100 -o gate.safetensors",
)
def train(
    model: GateModel = None,
    text: Text = None,
    distill: Distill = None,
    output: Output = Path("gate.safetensors"),
    target_keep: TargetKeep = 0.5,
    eviction_loss: Eviction = EvictionLoss.square,
    strength: Strength = 40.0,
    form: Form = GateForm.causal,
    heads: Heads = 2,
    head_size: HeadSize = 16,
    tau: Tau = 0.5,
    sinks: Sinks = 0,
    window: Window = 256,
    tokens: Tokens = 2048,
    steps: Steps = 400,
    rate: Rate = 0.003,
    every: Every = 25,
    patience: Patience = 6,
    ramp: Ramp = 0.5,
    seed: Seed = 0,
    resume: Resume = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Revision = None,
    force: Force = False,
    no_verify: NoVerify = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train gates on texts, or on recorded attention; the model itself is not changed.

    With --text the model runs with the gates. Training minimises the model's own loss and an eviction loss, which pulls
    the share of retained keys towards the target. With --distill the model does not run: gates learn which keys later
    queries attended to most.
    """
    from kvscope.cli import console
    from kvscope.cli.hints import replay_of

    _require_arguments(model, text, distill, output, force)
    design = GateDesign(heads, head_size, form, tau, sinks)
    settings = TrainingSettings(target_keep, eviction_loss, strength, steps, rate, every, patience, ramp)
    training = _Training(output, design, settings, seed, resume, quiet)
    if distill:
        made = training.on_traces(distill, device, compare=not no_verify)
    else:
        source = ModelSource(str(model), revision, dtype, device)
        made = training.on_texts(source, text or [], TextWindows(window, tokens))
    _show(made, as_json=json)
    command = replay_of(f"attention-gate:gate={output}", distill or ())
    before = "" if distill else "record a trace of this model with --hidden, then "
    console.note(f"next: {before}{command}", quiet=quiet)


@dataclass(frozen=True)
class _Training:
    """A training on texts or on traces, with a progress bar."""

    output: Path
    design: GateDesign
    settings: TrainingSettings
    seed: int
    resume: bool
    quiet: bool

    def on_texts(self, source: ModelSource, files: list[Path], windows: TextWindows) -> Trained:
        with self._loading():
            from kvscope.training.train_gate import train_on_texts
        with self._bar() as report:
            return train_on_texts(
                source,
                files,
                self.output,
                design=self.design,
                settings=self.settings,
                windows=windows,
                seed=self.seed,
                resume=self.resume,
                progress_callback=report,
            )

    def on_traces(self, names: list[str], device: str, *, compare: bool) -> Trained:
        from kvscope.cli.places import find_trace

        with self._loading():
            from kvscope.trace.reader import open_trace
            from kvscope.training.train_gate import train_on_traces
        with self._bar() as report:
            return train_on_traces(
                [open_trace(find_trace(name, quiet=self.quiet), compare=compare) for name in names],
                self.output,
                design=self.design,
                settings=self.settings,
                seed=self.seed,
                device=device,
                resume=self.resume,
                progress_callback=report,
            )

    def _loading(self) -> AbstractContextManager[None]:
        from kvscope.cli.console import working

        return working("loading transformers", quiet=self.quiet)

    @contextmanager
    def _bar(self) -> Iterator[Callable[[int, Evaluation], None]]:
        from kvscope.cli.console import bar

        with bar("training gates", self.settings.steps, "steps", quiet=self.quiet) as update:
            yield lambda step, look: update(step, f"loss {look.loss:.3f}, retains {look.keep:.0%}")


def _require_arguments(
    model: str | None, text: list[Path] | None, distill: list[str] | None, output: Path, force: bool
) -> None:
    """Raise UsageError unless texts with a model, or traces, are named and the output can be written."""
    from kvscope.core.errors import UsageError

    if bool(text) == bool(distill):
        raise UsageError(
            "both texts and traces are given" if text else "neither texts nor traces are given",
            "Use --model M --text FILE, or --distill TRACE.",
        )
    if text and model is None:
        raise UsageError("--text needs a model", "Name one: --model demo")
    require_free(output, force)


def require_free(output: Path, force: bool) -> None:
    """Raise UsageError unless the output can be written."""
    from kvscope.core import output as outputs
    from kvscope.core.errors import UsageError

    if output.is_dir() or not output.absolute().parent.is_dir():
        raise UsageError(f"{output} cannot be written", f"Name a file in a folder that exists: -o {output.name}")
    outputs.require_free(output, force=force)


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
            ("keys retained", f"{best.keep:.1%} of those held out (target {target:.0%})"),
            ("by layer", ", ".join(f"{share:.0%}" for share in best.by_layer)),
            ("loss", f"{best.loss:.3f}; before training {first.loss:.3f}, with {first.keep:.0%} of the keys"),
            ("steps", f"{made.log[-1].step}, the best after {best.step}"),
            ("size", f"{made.path.stat().st_size / 1000:.0f} kB"),
        ],
        title=str(made.path),
    )

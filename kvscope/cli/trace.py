"""``kvscope trace``: generate with a real model and record its attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command
from kvscope.cli.options import Device, Force, Json, Quiet, TraceOutput, command_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvscope.cli.console import Update
    from kvscope.model.generate import Progress
    from kvscope.model.plan import RecordingPlan


@command("trace", order=10)
def trace(
    ctx: typer.Context,
    prompts: Annotated[
        list[Path],
        typer.Argument(metavar="PROMPT", help="Text files, or JSONL with a prompt per line.", show_default=False),
    ],
    model: Annotated[
        str, typer.Option("--model", "-m", help="demo, an alias (llama2-7b), a Hub id, or a local folder.")
    ],
    output: TraceOutput = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate after each prompt.", min=0)] = 128,
    continuation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Force this text after the prompt instead of generating."),
    ] = None,
    layers: Annotated[str | None, typer.Option(metavar="LIST", help="Record these layers only: 0,3,8-11.")] = None,
    heads: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Record these query heads only: 0-3,8-11. Heads that share keys and values go together; policies that "
            "decide per layer do not replay on such a trace.",
        ),
    ] = None,
    query_stride: Annotated[
        int, typer.Option(help="Record every n-th row of attention only: to read it, it cannot be replayed.", min=1)
    ] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="Sample instead of taking the likeliest token.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="With --do-sample.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="With --do-sample.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="With --do-sample; 0 is all tokens.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32, float16, bfloat16.")] = "auto",
    device: Device = "cpu",
    device_map: Annotated[
        str | None, typer.Option(help="As in transformers: auto, balanced, ...; needs accelerate.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap each prompt in the model's chat template.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model bring Python code of its own.")
    ] = False,
    query_block: Annotated[int, typer.Option(help="Queries whose rows are built at a time.", min=1)] = 128,
    prefill_chunk: Annotated[
        int | None,
        typer.Option(help="Tokens of the prompt that go through the model at a time; chosen to fit memory.", min=1),
    ] = None,
    store: Annotated[
        str,
        typer.Option(
            help="maps; maps+vectors: also every query, key and value; qkv: these alone, for long prompts: rows are "
            "recomputed when they are read; topk:K: the K heaviest keys of each row and sums of columns, lossy. What "
            "waits to be written is at most 64 MB."
        ),
    ] = "maps",
    hidden: Annotated[
        bool | None,
        typer.Option(
            "--hidden",
            help="Record layer inputs too, which gates need. Default: for models with a gate beside them, as demo.",
            show_default=False,
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Generate with a real model and record every attention row, or what it follows from.

    The trace goes to traces/NAME; its size is said, and checked against the disk, before the first token.
    """
    from kvscope.cli import console
    from kvscope.cli.info import show
    from kvscope.cli.places import TRACES, place

    path = place(TRACES, output, _name(prompts, model), force=force)
    with console.working("loading transformers", quiet=quiet):
        from kvscope.model.generate import trace as record

    with console.bar(f"tracing {model}", None, "tokens", quiet=quiet) as update:
        made = record(
            model,
            prompts,
            output=path,
            continuation=continuation,
            layers=_numbers("--layers", layers),
            heads=_numbers("--heads", heads),
            query_stride=query_stride,
            max_new_tokens=max_new_tokens,
            seed=seed,
            do_sample=do_sample,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            chat=chat,
            trust_remote_code=trust_remote_code,
            query_block=query_block,
            prefill_chunk=prefill_chunk,
            store=store,
            hidden=hidden,
            force=force,
            command=command_line(ctx),
            progress=progress_callback(update),
            announce=lambda plan: announce(plan, quiet),
        )
    show(made, as_json=json)
    console.note("next: kvscope replay --policy a2sf", quiet=quiet)


def announce(plan: RecordingPlan, quiet: bool) -> None:
    """Say how large a trace will be, before it starts."""
    from kvscope.cli.console import note
    from kvscope.core.output import size

    others = ", ".join(f"{store}: {size(count)}" for store, count in plan.others.items())
    note(f"{plan.path}: about {size(plan.bytes)} to write ({others}), {size(plan.free)} free on the disk", quiet=quiet)
    if plan.bytes > plan.in_flight:
        note(f"at most {size(plan.in_flight)} of it wait in memory", quiet=quiet)
    if plan.prefill_chunk is not None:
        note(f"prompts go through the model {plan.prefill_chunk:,} tokens at a time", quiet=quiet)


def progress_callback(update: Update) -> Callable[[Progress], None]:
    """Return a callback that moves a bar by the tokens done, and shows the bytes written."""
    from kvscope.core.output import size

    return lambda now: update(now.done, size(now.bytes), now.total)


def _name(prompts: Sequence[Path], model: str) -> str:
    """Return a name that says what was traced: ``prompt-demo``, ``a+3-more-Llama-2-7b-hf``."""
    from kvscope.cli.places import joined

    stems = joined([path.stem for path in prompts], most=1)
    return f"{stems}-{model.rstrip('/').rpartition('/')[2]}"


def _numbers(option: str, text: str | None) -> list[int] | None:
    """Return the numbers of ``0,3,8-11``, in order and without repeats."""
    from kvscope.core.errors import UsageError

    if text is None:
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UsageError(
                f"{option} {text!r}: {part.strip()!r} is no {option.strip('-').removesuffix('s')}",
                f"Write numbers and ranges: {option} 0,3,8-11",
            )
        chosen.update(range(int(first), int(last if dash else first) + 1))
    return sorted(chosen)

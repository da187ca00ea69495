"""``kvscope trace``: generate with a real model and record its attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from kvscope.cli import options, prompt_options
from kvscope.cli.command import command, examples
from kvscope.core.options import ModelSource, OutputOptions
from kvscope.core.recording_options import BlockOptions, ImageOptions, Sampling, StoreOptions, TextOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from kvscope.cli.console import Update
    from kvscope.core.json import Json
    from kvscope.model.plan import RecordingPlan
    from kvscope.model.run import Progress
    from kvscope.trace.reader import Trace


@command("trace", order=10)
@examples(
    "kvscope trace --model demo prompt.txt",
    "kvscope trace --model llama2-7b prompts.jsonl --store qkv",
)
def trace(
    ctx: typer.Context,
    prompts: prompt_options.Prompts,
    model: options.Model,
    output: options.TraceOutput = None,
    max_new_tokens: options.MaxNewTokens = 128,
    continuation: prompt_options.Continuation = None,
    answer: prompt_options.Answer = None,
    image: prompt_options.Image = None,
    layers: options.Layers = None,
    heads: options.Heads = None,
    query_stride: options.QueryStride = 1,
    seed: options.SamplingSeed = 0,
    do_sample: options.DoSample = False,
    temperature: options.Temperature = 1.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    device: options.Device = "auto",
    device_map: options.DeviceMap = None,
    revision: options.Revision = None,
    chat: prompt_options.Chat = False,
    system: prompt_options.System = None,
    chat_option: prompt_options.ChatOption = None,
    field: prompt_options.Field = None,
    template: prompt_options.Template = None,
    trust_remote_code: options.TrustRemoteCode = False,
    query_block: options.QueryBlock = 128,
    prefill_chunk: options.PrefillChunk = None,
    store: options.Store = "auto",
    hidden: options.Hidden = None,
    outputs: options.Outputs = False,
    reread: options.Reread = False,
    force: options.Force = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Generate with a real model and record every attention row, or the vectors that determine it, in traces/NAME.

    Before it starts, the command prints the estimated size and checks it against the free disk space.
    """
    from kvscope.cli import console

    (files, path), given = _place(output, prompts, model, force, quiet), _given(chat_option, answer, image, template)
    compile_recording = _compiler(quiet)
    with console.loading(f"loading {model}", quiet=quiet):
        plan = compile_recording(
            ModelSource(model, revision, dtype, device, device_map, trust_remote_code, quantize),
            files,
            OutputOptions(path, force, options.command_line(ctx)),
            text=TextOptions(continuation, chat, max_new_tokens, seed, field, system, *given),
            store=StoreOptions(store, *_selected(layers, heads), query_stride, hidden, outputs, reread),
            sampling=Sampling(do_sample, temperature, top_p, top_k),
            blocks=BlockOptions(query_block, prefill_chunk),
        )
    announce(plan, quiet)
    with console.bar(f"tracing {model}", None, "tokens", quiet=quiet) as update:
        made = plan.execute(progress_callback(update))
    _show(made, as_json=json, quiet=quiet)


def _compiler(quiet: bool) -> Callable[..., RecordingPlan]:
    """Return the function that compiles a recording; loading what it needs takes seconds."""
    from kvscope.cli import console

    with console.working("loading transformers", quiet=quiet):
        from kvscope.model.compile import compile_recording
    return compile_recording


def _show(made: Trace, *, as_json: bool, quiet: bool) -> None:
    """Print what was recorded, and what can be done with it next."""
    from kvscope.cli.console import note
    from kvscope.cli.hints import next_command
    from kvscope.cli.info import show

    show(made, as_json=as_json, said=True)
    note(next_command(made), quiet=quiet)


def announce(plan: RecordingPlan, quiet: bool) -> None:
    """Print how large a trace will be, before the recording starts."""
    from kvscope.cli.console import note, warn
    from kvscope.core.output import size

    others = ", ".join(f"{store}: {size(count)}" for store, count in plan.others.items())
    note(f"{plan.path}: writes about {size(plan.bytes)} ({others}); {size(plan.free)} are free", quiet=quiet)
    if plan.automatic:
        note(_choice(plan.header.store, plan.others, plan.header.rows_from == "module"), quiet=quiet)
    for line in plan.notes:
        warn(line)
    if plan.bytes > plan.in_flight:
        note(f"at most {size(plan.in_flight)} of it are buffered in memory", quiet=quiet)
    if plan.prefill_chunk is not None:
        note(f"prompts are processed {plan.prefill_chunk:,} tokens at a time", quiet=quiet)


def _choice(store: str, others: Mapping[str, int], from_modules: bool) -> str:
    """Return the line about a store that was chosen by the size of the trace."""
    from kvscope.core.output import size

    if store == "maps+vectors":
        return "store: maps+vectors, because the trace is small; output_error and policies that read keys need vectors"
    if from_modules or "maps+vectors" not in others:
        return "store: maps, the only one that this model supports"
    more = f"--store maps+vectors ({size(others['maps+vectors'])}) or qkv ({size(others['qkv'])})"
    return f"store: maps, because the trace is large; for output_error and policies that read keys: {more}"


def progress_callback(update: Update) -> Callable[[Progress], None]:
    """Return a callback that shows the tokens done and the bytes written in a bar."""
    from kvscope.core.output import size

    return lambda now: update(now.done, size(now.bytes), now.total)


def _place(
    output: str | None, prompts: Sequence[str], model: str, force: bool, quiet: bool
) -> tuple[Sequence[str | Path], Path]:
    """Return the files of prompts, of which those at addresses are fetched, and the folder of the trace."""
    from kvscope.cli.places import TRACES, local_file, place

    files = [local_file(given, "prompts", quiet=quiet) for given in prompts]
    return files, place(TRACES, output, _name(files, model), force=force)


def _name(prompts: Sequence[str | Path], model: str) -> str:
    """Return a name of prompts and model: ``prompt-demo``, ``a+3-more-Llama-2-7b-hf``."""
    from kvscope.cli.places import joined
    from kvscope.core.text_names import text_name

    stems = joined([text_name(path) for path in prompts], most=1)
    return f"{stems}-{model.rstrip('/').rpartition('/')[2]}"


def _given(
    chat_options: list[str] | None, answers: list[str] | None, images: list[str] | None, template: str | None
) -> tuple[dict[str, Json], tuple[str, ...], ImageOptions, str | None]:
    """Return options of the chat template, what is given beside a single prompt, and the template of prompts."""
    from kvscope.sharing.remote import read_address

    return _chat_options(chat_options), tuple(answers or ()), ImageOptions(tuple(images or ()), read_address), template


def _chat_options(given: Sequence[str] | None) -> dict[str, Json]:
    """Return the values of ``NAME=VALUE``, which are JSON where they can be read as such, and otherwise texts."""
    import json

    from kvscope.core.errors import UsageError

    found: dict[str, Json] = {}
    for item in given or ():
        name, equals, value = item.partition("=")
        if not name or not equals:
            raise UsageError(f"--chat-option {item!r} has no value", "Write --chat-option enable_thinking=false")
        if name in found:
            raise UsageError(f"--chat-option {name} is given twice", "Give it once.")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def _selected(layers: str | None, heads: str | None) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    """Return the numbers of the layers and of the heads to record; None for all."""
    return _numbers("--layers", layers), _numbers("--heads", heads)


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Return the numbers of ``0,3,8-11``, in order and without repeats."""
    from kvscope.core.errors import UsageError

    if text is None:
        return None
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
            raise UsageError(
                f"{option} {text!r}: {part.strip()!r} is not a {option.strip('-').removesuffix('s')}",
                f"Write numbers and ranges: {option} 0,3,8-11",
            )
        chosen.update(range(int(first), int(last if dash else first) + 1))
    return tuple(sorted(chosen))

"""``kvscope demo``: trace, replay and report on the bundled model, offline."""

from __future__ import annotations

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.options import Json, Quiet, command_line
from kvscope.core.options import ModelSource, OutputOptions, ReplayOptions
from kvscope.core.recording_options import StoreOptions, TextOptions

BUDGETS = "10%,20%,40%"
NEW_TOKENS = 128
STORE = "maps+vectors"  # so that policies that need keys and queries can run


@command("demo", order=170)
@examples(
    "kvscope demo",
    "kvscope demo --quiet",
)
def demo(ctx: typer.Context, json: Json = False, quiet: Quiet = False) -> None:
    """Trace the bundled model, replay every policy at three budgets, write the report: under a minute, offline."""
    from kvscope.cli import console, places
    from kvscope.cli.hints import next_command
    from kvscope.cli.summary import show
    from kvscope.cli.trace import announce, progress_callback

    with console.working("loading torch and transformers", quiet=quiet):
        from kvscope.model.compile import compile_recording
        from kvscope.model.names import demo_folder
        from kvscope.policies import POLICIES
        from kvscope.replay.compile import compile_replay
        from kvscope.report.page import report as write

    path = places.place(places.TRACES, None, "demo", force=False)
    with console.bar("tracing the bundled model", None, "tokens", quiet=quiet) as update:
        plan = compile_recording(
            ModelSource("demo"),
            [demo_folder() / "prompt.txt"],
            OutputOptions(path, command=command_line(ctx)),
            text=TextOptions(max_new_tokens=NEW_TOKENS),
            store=StoreOptions(STORE),
        )
        announce(plan, quiet)
        trace = plan.execute(progress_callback(update))
    tokens = sum(sequence.length for sequence in trace.sequences)
    job = compile_replay(trace, POLICIES.names(), BUDGETS, ReplayOptions(skip_unsupported=True))
    with console.bar(f"replaying {len(job.plans)} policies", tokens, "tokens", quiet=quiet) as update:
        output = OutputOptions(places.place(places.REPORTS, None, path.name, force=False), command=command_line(ctx))
        made = job.execute(output, lambda share: update(share * tokens))
    page = places.place(places.REPORTS, None, made.path.name, force=False, suffix=".html")
    with console.bar("drawing", 100, "%", quiet=quiet) as update:
        write([made], {trace.identity: trace}, page, progress=lambda share: update(100 * share))
    if json:
        console.show_json(
            {"trace": str(trace.path), "replay": str(made.path), "report": str(page), "summary": made.summary}
        )
        return
    show(made)
    console.show_text(f"\nreport: {page}")
    console.note(next_command(trace), quiet=quiet)

"""The options of the commands, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvscope.core.options import Positions, Prefill, TuneLevel

# What is replayed.
Policy = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        "-p",
        metavar="POLICY",
        help="Run a policy: NAME, NAME:param=value,..., path/to/file.py:Class, or all. Repeatable.",
        show_default=False,
    ),
]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        "-b",
        metavar="LIST",
        help="Limit the cache to keys or shares: 20%,40%,256. Default: 20%.",
        show_default=False,
    ),
]
PrefillMode = Annotated[
    Prefill,
    typer.Option("--prefill", help="Evict once, at the end of the prompt (full), or from the first token on (stream)."),
]
Compress = Annotated[
    str | None,
    typer.Option(
        "--compress", metavar="WHEN", help="Evict at prefill, step or every:N. Default: each policy as published."
    ),
]
Allocate = Annotated[
    str | None,
    typer.Option(
        "--allocate", metavar="NAME", help="Share the budget among layers and heads: uniform, pyramid, ada, cake."
    ),
]
Accumulate = Annotated[
    str | None, typer.Option("--accumulate", metavar="DTYPE", help="Sum in float32, float16 or bfloat16.")
]
Metrics = Annotated[
    list[str] | None,
    typer.Option(
        "--metric",
        metavar="NAME",
        help="Compute a metric. Repeatable. Default: all that the trace allows.",
        show_default=False,
    ),
]

# The model.
Model = Annotated[str, typer.Option("--model", "-m", help="Load demo, an alias (llama2-7b), a Hub id, or a folder.")]
ClosedLoop = Annotated[
    bool, typer.Option("--perplexity", help="Run the model again with the policies inside: the closed loop.")
]
TracedModel = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="Load the model from here instead of from where the trace had it."),
]
PositionsMode = Annotated[
    Positions,
    typer.Option("--positions", help="Let keys keep their place in the text, or take that in the cache."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="Load the model in auto, float64, float32, float16 or bfloat16.")]
Device = Annotated[str, typer.Option("--device", help="Compute on cpu, cuda, cuda:1, mps or auto.")]
DeviceMap = Annotated[
    str | None, typer.Option("--device-map", help="Place the parts of the model as in transformers; needs accelerate.")
]
Revision = Annotated[str | None, typer.Option("--revision", help="Load a branch, tag or commit of a Hub model.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model bring Python code of its own.")
]

# What is recorded.
Prompts = Annotated[
    list[Path],
    typer.Argument(metavar="PROMPT", help="Text files, or JSONL with a prompt per line.", show_default=False),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Generate so many tokens at most.", min=0)]
Continuation = Annotated[
    Path | None,
    typer.Option("--continuation", metavar="FILE", help="Force this text after the prompt instead of generating."),
]
Chat = Annotated[bool, typer.Option("--chat", help="Wrap each prompt in the model's chat template.")]
SamplingSeed = Annotated[int, typer.Option("--seed", help="Seed the sampling.")]
DoSample = Annotated[bool, typer.Option("--do-sample", help="Sample instead of taking the likeliest token.")]
Temperature = Annotated[float, typer.Option("--temperature", help="With --do-sample.")]
TopP = Annotated[float, typer.Option("--top-p", help="With --do-sample.")]
TopK = Annotated[int, typer.Option("--top-k", help="With --do-sample; 0 is all tokens.")]
Layers = Annotated[str | None, typer.Option("--layers", metavar="LIST", help="Record these layers only: 0,3,8-11.")]
Heads = Annotated[
    str | None,
    typer.Option(
        "--heads",
        metavar="LIST",
        help="Record these query heads only: 0-3,8-11. Heads that share keys and values go together; policies that "
        "decide per layer do not replay on such a trace.",
    ),
]
QueryStride = Annotated[
    int,
    typer.Option("--query-stride", help="Record every n-th row of attention only: it cannot be replayed.", min=1),
]
QueryBlock = Annotated[int, typer.Option("--query-block", help="Build the rows of so many queries at a time.", min=1)]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        "--prefill-chunk",
        help="Send so many tokens of a prompt through the model at once. Default: by memory.",
        min=1,
    ),
]
Store = Annotated[
    str,
    typer.Option(
        "--store",
        help="maps; maps+vectors: also every query, key and value; qkv: these alone, for long prompts: rows are "
        "recomputed when they are read; topk:K: the K heaviest keys of each row and sums of columns, lossy. What "
        "waits to be written is at most 64 MB.",
    ),
]
Hidden = Annotated[
    bool | None,
    typer.Option(
        "--hidden",
        help="Record layer inputs too, which gates need. Default: for models with a gate beside them, as demo.",
        show_default=False,
    ),
]

# What is read.
TraceSource = Annotated[
    str | None,
    typer.Option("--trace", metavar="TRACE", help="Read the trace here. Default: where it was.", show_default=False),
]
ReplayName = Annotated[
    str | None,
    typer.Argument(metavar="REPLAY", help="Name under reports/, or a path. Default: the newest.", show_default=False),
]
RunPolicy = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        "-p",
        metavar="POLICY",
        help="Select runs by label, name or number. Repeatable. Default: all.",
        show_default=False,
    ),
]
RunBudget = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        "-b",
        metavar="LIST",
        help="Select runs by their budgets as given: 20%,256. Default: all.",
        show_default=False,
    ),
]

# What is written.
TraceOutput = Annotated[
    str | None,
    typer.Option("-o", "--output", "--name", metavar="NAME", help="Write here: a name under traces/, or a path."),
]
ReportOutput = Annotated[
    str | None,
    typer.Option("-o", "--output", "--name", metavar="NAME", help="Write here: a name under reports/, or a path."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]

# Of `perplexity`.
TextFiles = Annotated[list[str], typer.Argument(metavar="TEXT", help="UTF-8 text files.", show_default=False)]
Window = Annotated[
    int | None,
    typer.Option(
        "--window",
        metavar="TOKENS",
        help="Cut texts into windows of so many tokens. Default: 1024, or the context.",
        min=2,
    ),
]
MaxWindows = Annotated[
    int | None,
    typer.Option("--max-windows", metavar="N", help="Read at most N windows of each file. Default: all.", min=1),
]
PromptLength = Annotated[
    int,
    typer.Option(
        "--prompt-length",
        metavar="TOKENS",
        help="Read so many tokens of each window with the full cache, unscored.",
        min=1,
    ),
]
# Of `verify`.
DecodedTokens = Annotated[
    int | None,
    typer.Option("--tokens", metavar="N", help="Decode at most N tokens of each sequence. Default: 128.", min=1),
]
FirstSequences = Annotated[
    int, typer.Option("--sequences", metavar="N", help="Use the first N sequences of the trace.", min=1)
]
# Of `tune`.
TraceNames = Annotated[
    list[str] | None,
    typer.Argument(metavar="TRACE", help="Names under traces/, or paths. Default: the newest.", show_default=False),
]
TunedPolicy = Annotated[str, typer.Option("--policy", "-p", metavar="POLICY", help="Tune this policy.")]
Grid = Annotated[
    list[str] | None,
    typer.Option(
        "--grid",
        metavar="NAME=LIST",
        help="Try values: alpha=0.1,0.5,0.9. Repeatable. Default: those that the policy names.",
        show_default=False,
    ),
]
Level = Annotated[
    TuneLevel, typer.Option("--per", help="Choose a setting for the model, each layer or key/value head.")
]
OneBudget = Annotated[str, typer.Option("--budget", "-b", metavar="BUDGET", help="Limit the cache to keys or a share.")]
TunedMetric = Annotated[str, typer.Option("--metric", metavar="NAME", help="Improve this metric.")]
HeldOut = Annotated[
    int | None,
    typer.Option("--held-out", metavar="N", help="Keep N sequences for the reported gain. Default: a quarter."),
]
TomlFile = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Write this TOML file.")]


def command_line(ctx: typer.Context) -> str:
    """Return the command as it was typed, for the provenance of what it writes."""
    import shlex

    return shlex.join(["kvscope", *ctx.find_root().obj])

"""The options of the commands, each defined once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvscope.cli.completion import metric_names, policy_names, replay_names, trace_names
from kvscope.core.options import Positions, Prefill, TuneLevel

# What is replayed.
Policy = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        "-p",
        metavar="POLICY",
        autocompletion=policy_names,
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
        help="Limit the cache to a number or share of keys: 20%,40%,256. Default: 20%.",
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
        "--compress", metavar="WHEN", help="Evict at prefill, step or every:N. Default: as each policy was published."
    ),
]
Allocate = Annotated[
    str | None,
    typer.Option(
        "--allocate",
        metavar="NAME",
        help="Allocate the budget to layers and heads: uniform, pyramid, ada, cake, heads, decay.",
    ),
]
Scope = Annotated[
    str | None,
    typer.Option(
        "--scope",
        metavar="WHO",
        help="Select keys for each kv_head, or once for the whole layer. Default: as published; layer with a latent "
        "cache.",
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
        autocompletion=metric_names,
        help="Compute this metric. Repeatable. Default: all that the trace supports.",
        show_default=False,
    ),
]

# The model.
Model = Annotated[
    str, typer.Option("--model", "-m", help="Load demo, an alias (llama2-7b), a Hub id, a folder or a .gguf file.")
]
ClosedLoop = Annotated[
    bool,
    typer.Option("--perplexity", help="Add the closed loop: run the model again with the policies in its attention."),
]
TracedModel = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help="Load this model. Default: the model of the trace."),
]
PositionsMode = Annotated[
    Positions,
    typer.Option("--positions", help="RoPE positions: original, or compacted (renumbered within the cache)."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="Load the model in auto, float64, float32, float16 or bfloat16.")]
Device = Annotated[
    str,
    typer.Option(
        "--device",
        help="Compute on cpu, cuda, cuda:1, mps, or auto: the first of cuda, mps, cpu.",
    ),
]
DeviceMap = Annotated[
    str | None,
    typer.Option("--device-map", help="Distribute the model over devices, as in transformers; needs accelerate."),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Load a branch, tag or commit of a Hub model.")]
Quantize = Annotated[
    str | None,
    typer.Option("--quantize", metavar="BITS", help="Quantise the weights at loading: 4bit or 8bit; needs CUDA."),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]

# What is recorded.
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Generate at most this many tokens.", min=0)]
SamplingSeed = Annotated[int, typer.Option("--seed", help="Seed the sampling.")]
DoSample = Annotated[bool, typer.Option("--do-sample", help="Sample instead of taking the most probable token.")]
Temperature = Annotated[float, typer.Option("--temperature", help="With --do-sample: sample at this temperature.")]
TopP = Annotated[float, typer.Option("--top-p", help="With --do-sample: keep this probability mass.")]
TopK = Annotated[int, typer.Option("--top-k", help="With --do-sample: keep this many tokens; 0 keeps all.")]
Layers = Annotated[str | None, typer.Option("--layers", metavar="LIST", help="Record these layers only: 0,3,8-11.")]
Heads = Annotated[
    str | None,
    typer.Option(
        "--heads",
        metavar="LIST",
        help="Record these query heads only: 0-3,8-11. Name all heads that share keys and values. Policies that "
        "decide per layer need all heads.",
    ),
]
QueryStride = Annotated[
    int,
    typer.Option(
        "--query-stride", help="Record only every N-th attention row; such a trace cannot be replayed.", min=1
    ),
]
QueryBlock = Annotated[
    int, typer.Option("--query-block", help="Compute the rows of this many queries at a time.", min=1)
]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        "--prefill-chunk",
        help="Process this many tokens of a prompt at a time. Default: as memory allows.",
        min=1,
    ),
]
Store = Annotated[
    str,
    typer.Option(
        "--store",
        help="What to store. maps: attention rows. maps+vectors: also queries, keys and values. qkv: only these, for "
        "long prompts; rows are recomputed when read. topk:K: the K heaviest keys of each row and sums of columns, "
        "lossy. auto: maps+vectors if that takes at most 100 MB, otherwise maps. The write buffer has at most 64 MB, "
        "or 16 MB for each writing thread if that is more.",
    ),
]
Hidden = Annotated[
    bool | None,
    typer.Option(
        "--hidden",
        help="Record layer inputs, which gates need. Default: only for models that come with a gate, such as demo.",
        show_default=False,
    ),
]
Outputs = Annotated[
    bool,
    typer.Option("--outputs", help="Record the norms of values after the output projection, which criticalkv needs."),
]
Reread = Annotated[
    bool, typer.Option("--reread", help="Let the model read each prompt a second time, which kvzip needs.")
]

# What is read.
TraceSource = Annotated[
    str | None,
    typer.Option(
        "--trace",
        metavar="TRACE",
        autocompletion=trace_names,
        help="Read the trace from this name, path or address. Default: its recorded path.",
        show_default=False,
    ),
]
ReplayName = Annotated[
    str | None,
    typer.Argument(
        metavar="REPLAY",
        autocompletion=replay_names,
        help="Read this replay: a name under reports/, path or address (s3://, https://). Default: the newest.",
        show_default=False,
    ),
]
RunPolicy = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        "-p",
        metavar="POLICY",
        autocompletion=policy_names,
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
        help="Select runs by budget, written as in the replay: 20%,256. Default: all.",
        show_default=False,
    ),
]

# What is written.
TraceOutput = Annotated[
    str | None,
    typer.Option("-o", "--output", "--name", metavar="NAME", help="Write to this name under traces/, or path."),
]
ReportOutput = Annotated[
    str | None,
    typer.Option("-o", "--output", "--name", metavar="NAME", help="Write to this name under reports/, or path."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not compare the checksums of the trace's files with its header.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]

# Of `perplexity`.
TextFiles = Annotated[
    list[str],
    typer.Argument(
        metavar="TEXT", help="Score these UTF-8 text files; gzip, zstd; - is standard input.", show_default=False
    ),
]
Window = Annotated[
    int | None,
    typer.Option(
        "--window",
        metavar="TOKENS",
        help="Cut texts into windows of this many tokens. Default: 1024, or the context of the model if that is "
        "smaller.",
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
        help="Read the first N tokens of each window with the full cache, and do not score them.",
        min=1,
    ),
]
# Of `verify`.
DecodedTokens = Annotated[
    int | None,
    typer.Option("--tokens", metavar="N", help="Decode at most N tokens of each sequence.", min=1),
]
FirstSequences = Annotated[
    int, typer.Option("--sequences", metavar="N", help="Use the first N sequences of the trace.", min=1)
]
# Of `tune`.
TraceNames = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="TRACE",
        autocompletion=trace_names,
        help="Use these traces: names under traces/, paths or addresses. Default: the newest.",
        show_default=False,
    ),
]
TunedPolicy = Annotated[
    str, typer.Option("--policy", "-p", metavar="POLICY", autocompletion=policy_names, help="Tune this policy.")
]
Grid = Annotated[
    list[str] | None,
    typer.Option(
        "--grid",
        metavar="NAME=LIST",
        help="Try these values: alpha=0.1,0.5,0.9. Repeatable. Default: the grid of the policy.",
        show_default=False,
    ),
]
Level = Annotated[
    TuneLevel, typer.Option("--per", help="Choose parameters for the model, or for each layer or key/value head.")
]
OneBudget = Annotated[
    str, typer.Option("--budget", "-b", metavar="BUDGET", help="Limit the cache to a number or share of keys.")
]
TunedMetric = Annotated[
    str, typer.Option("--metric", metavar="NAME", autocompletion=metric_names, help="Improve this metric.")
]
HeldOut = Annotated[
    int | None,
    typer.Option("--held-out", metavar="N", help="Hold out N sequences to measure the gain. Default: a quarter."),
]
TomlFile = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Write this TOML file.")]


def command_line(ctx: typer.Context) -> str:
    """Return the command as it was typed, without secrets in addresses: part of the provenance of its output."""
    import shlex

    from kvscope.sharing.remote import is_remote, shown

    typed = [shown(word) if is_remote(word) else word for word in ctx.find_root().obj]
    return shlex.join(["kvscope", *typed])

"""The options of `trace` that say what the model reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Prompts = Annotated[
    list[str],
    typer.Argument(
        metavar="PROMPT",
        help="Record these prompts: text files, or JSON, JSONL and Parquet files with a prompt or messages in each "
        "object, also compressed with gzip or zstd; a folder of them; an address such as hf://, s3://, https://; - "
        "for standard input. Special tokens in a text are read as special tokens.",
        show_default=False,
    ),
]
Field = Annotated[
    str | None,
    typer.Option(
        "--field",
        metavar="NAME",
        help="Read the prompt from this field of JSON objects. Default: prompt, messages, context with input or "
        "question, input, text.",
        show_default=False,
    ),
]
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="TEXT",
        help="Build the prompt from the fields of JSON objects: '{context} Question: {input}'. Default: see --field.",
        show_default=False,
    ),
]
Answer = Annotated[
    list[str] | None,
    typer.Option(
        "--answer",
        metavar="TEXT",
        help="Give a right answer to the prompt; needs a single prompt. Repeatable.",
        show_default=False,
    ),
]
Image = Annotated[
    list[str] | None,
    typer.Option(
        "--image",
        metavar="PATH",
        help="Give an image of the prompt, a file or an address such as https://...; needs a single prompt. "
        "Repeatable, in the order of the placeholders in the text.",
        show_default=False,
    ),
]
Continuation = Annotated[
    Path | None,
    typer.Option("--continuation", metavar="FILE", help="Force this text after the prompt instead of generating."),
]
Chat = Annotated[
    bool, typer.Option("--chat", help="Wrap each prompt in the model's chat template; messages always are.")
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="With --chat: add a system message.")]
ChatOption = Annotated[
    list[str] | None,
    typer.Option(
        "--chat-option",
        metavar="NAME=VALUE",
        help="Pass this option to the chat template, with VALUE in JSON: enable_thinking=false. Repeatable.",
        show_default=False,
    ),
]

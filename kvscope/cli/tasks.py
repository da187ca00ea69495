"""``kvscope tasks``: prompts with exact answers, generated for any length."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command_group, examples
from kvscope.cli.options import Force, Json, Quiet
from kvscope.cli.typer_classes import HelpCommand
from kvscope.core.options import ModelSource

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvscope.tasks.make import Lengths

app = command_group(
    "tasks", order=15, help="Make prompts with exact answers: needles in a haystack, variables, words, facts."
)


@app.command("list", cls=HelpCommand)
@examples(
    "kvscope tasks list",
    "kvscope tasks list --json",
)
def list_(json: Json = False) -> None:
    """List the task families."""
    from kvscope.cli import console
    from kvscope.cli.console import Column
    from kvscope.tasks.describe import describe

    rows = describe()
    if json:
        console.show_json(rows)
        return
    console.show_table(
        [
            Column("task", [row["name"] for row in rows]),
            Column("what is asked", [row["summary"] for row in rows], wrap=48),
            Column("parameters", [", ".join(f"{p['name']}={p['default']}" for p in row["parameters"]) for row in rows]),
            Column("score", [row["metric"] for row in rows], keep=20),
            Column("from", [row["paper"] for row in rows], keep=10),
        ],
        notes=["kvscope tasks show NAME describes one. kvscope tasks make NAME --length 512 writes prompts."],
    )


@app.command("show", cls=HelpCommand)
@examples(
    "kvscope tasks show needle",
    "kvscope tasks show needle --length 200 --seed 1",
)
def show(
    task: Annotated[str, typer.Argument(metavar="TASK", help="Describe this family: needle, or needle:digits=4.")],
    length: Annotated[int, typer.Option(metavar="N", help="Show an example of this many words.", min=1)] = 100,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the example.")] = 0,
    json: Json = False,
) -> None:
    """Describe a task family, with an example."""
    from kvscope.cli import console
    from kvscope.tasks.dataset import as_object
    from kvscope.tasks.describe import describe_one
    from kvscope.tasks.make import Lengths, make_examples, words
    from kvscope.tasks.spec import parse_task

    family = parse_task(task)
    about, (example,) = describe_one(type(family)), make_examples(family, Lengths(length, words, "words"), 1, seed=seed)
    if json:
        console.show_json({**about, "example": as_object(example)})
        return
    console.show_text(about["text"])
    pairs = [("score", about["metric"]), ("from", about["paper"])]
    console.show_pairs(
        [*pairs, *((item["name"], f"{item['help']} (default {item['default']})") for item in about["parameters"])]
    )
    console.show_text(example.prompt)
    console.show_pairs([("answers", ", ".join(example.answers))])


@app.command("make", cls=HelpCommand)
@examples(
    "kvscope tasks make needle --length 2000 --model demo -o needles.jsonl",
    "kvscope tasks make variable-tracking --length 500 --number 20",
)
def make(
    task: Annotated[
        list[str], typer.Argument(metavar="TASK...", help="Make these tasks: needle needle-multikey:distractors=7.")
    ],
    length: Annotated[
        list[int],
        typer.Option(
            "--length",
            "-l",
            metavar="N",
            help="Largest number of tokens in a prompt, without the answer. Repeatable.",
            min=1,
        ),
    ],
    number: Annotated[
        int, typer.Option("--number", "-n", metavar="N", help="Number of examples for each task and length.", min=1)
    ] = 10,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Count tokens with the tokenizer of this model. Default: count words."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a Hub model.")] = None,
    haystack: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plant facts in this text. Default: pieces of five novels.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of all random numbers.")] = 0,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Write JSON lines to this file; - prints them.")
    ] = Path("tasks.jsonl"),
    force: Force = False,
    quiet: Quiet = False,
) -> None:
    """Write prompts with answers as JSON lines, which kvscope trace reads."""
    from kvscope.cli import console
    from kvscope.core.output import replace_file, require_free
    from kvscope.core.text_files import read_text
    from kvscope.tasks.dataset import as_lines
    from kvscope.tasks.haystack import Haystack
    from kvscope.tasks.make import make_examples
    from kvscope.tasks.spec import parse_task

    families, to_terminal = [parse_task(spec) for spec in dict.fromkeys(task)], str(output) == "-"
    if not to_terminal:
        require_free(output, force=force)
    text = Haystack(None if haystack is None else read_text(haystack))
    counted = _lengths(model, revision, quiet)
    examples = [
        example
        for family in families
        for longest in dict.fromkeys(length)
        for example in make_examples(family, counted(longest), number, seed=seed, haystack=text)
    ]
    if to_terminal:
        console.show_raw(as_lines(examples))
        return
    replace_file(output, as_lines(examples).encode(), force=force)
    console.note(f"{output}: {len(examples)} examples", quiet=quiet)
    console.note(f"next: kvscope trace --model {model or 'MODEL'} {output}", quiet=quiet)


def _lengths(model: str | None, revision: str | None, quiet: bool) -> Callable[[int], Lengths]:
    """Return the function that makes a length, in tokens of a model or in words."""
    from kvscope.cli import console
    from kvscope.tasks.make import Lengths, words

    if model is None:
        return lambda longest: Lengths(longest, words, "words")
    with console.working("loading the tokenizer", quiet=quiet):
        from kvscope.model.token_count import token_counter

        count = token_counter(ModelSource(model, revision))
    return lambda longest: Lengths(longest, count, "tokens")

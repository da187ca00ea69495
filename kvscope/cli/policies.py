"""``kvscope policies``: every policy, its parameters, and what it needs from a trace."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command
from kvscope.cli.options import Json

if TYPE_CHECKING:
    from kvscope.cli.console import Column
    from kvscope.policies.describe import ParameterDescription, PolicyDescription


@command("policies", order=140)
def policies(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Describe this policy in full.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """List the policies, or describe one in full."""
    from kvscope.cli import console
    from kvscope.policies import POLICIES
    from kvscope.policies.describe import describe

    rows = describe(name)
    for broken, why in POLICIES.broken.items():
        console.warn(f"policy {broken} is installed but cannot be loaded: {why}")
    if json:
        console.show_json(rows if name is None else rows[0])
    elif name is None:
        console.show_table(
            columns(rows),
            notes=["kvscope policies NAME describes one policy. Set a parameter with --NAME VALUE, as in --alpha 0.7."],
        )
    else:
        _show_one(rows[0])


def columns(rows: Sequence[PolicyDescription]) -> list[Column]:
    """Return the columns of the list of policies."""
    from kvscope.cli.console import Column

    return [
        Column("policy", [row["name"] for row in rows]),
        Column("parameters", ["\n".join(_setting(item) for item in row["parameters"]) or "-" for row in rows]),
        Column("retains", [_unwrapped(row["summary"]) for row in rows], wrap=32),
        Column("needs", [", ".join(row["needs"]) or "-" for row in rows], keep=30),
        Column("evicts", [_evicts(row) for row in rows], keep=25),
        Column("scope", [row["scope"].replace("_", " ") for row in rows], keep=20),
        Column("from", [row["paper"] for row in rows], keep=10),
        Column("compared with", [row["proven"] or "-" for row in rows], keep=5, wrap=24),
    ]


def _show_one(row: PolicyDescription) -> None:
    from kvscope.cli import console

    console.show_text(row["name"], style="bold")
    console.show_text(_unwrapped(row["doc"]) + "\n")
    console.show_pairs(
        [
            ("needs", ", ".join(row["needs"]) or "nothing but the length of the trace"),
            ("decides per", row["scope"].replace("_", " ")),
            ("evicts", _evicts(row)),
            ("budget", "as given" if row["bounded"] else "ignored: it decides how many keys to retain"),
            ("allocation", row["allocate"]),
            ("prefill", ", ".join(row["prefills"])),
            ("variants", ", ".join(row["variants"]) or "none"),
            ("from", row["paper"]),
            ("compared with", row["proven"] or "the contract that holds for every policy"),
        ]
    )
    if not row["parameters"]:
        console.show_text("\nIt has no parameters.")
        return
    console.show_text("")
    items = row["parameters"]
    console.show_table(
        [
            console.Column("parameter", ["--" + item["name"].replace("_", "-") for item in items]),
            console.Column("type", [item["type"] for item in items], keep=50),
            console.Column("default", [str(item["default"]) for item in items]),
            console.Column("what it does", [item["help"] for item in items], wrap=32),
        ]
    )


def _evicts(row: PolicyDescription) -> str:
    """Return when a policy evicts, in words, and whether it is a bound."""
    phase = str(row["phase"])
    if row["reads"]:
        evicts = "never: reads a part"
    elif phase.startswith("every:"):
        evicts = f"every {phase.removeprefix('every:')} steps"
    else:
        evicts = {"step": "at every step", "prefill": "once, after the prompt"}.get(phase, "never")
    return f"{evicts}; a bound that uses the future" if row["clairvoyant"] else evicts


def _unwrapped(doc: str) -> str:
    """Return a docstring as text for a terminal: paragraphs on one line, code unchanged, without markup."""
    plain = re.sub(r"^(\w+)\n-+$", r"\1:\n", doc.replace("``", ""), flags=re.MULTILINE)
    paragraphs = re.split(r"\n\n+", plain)
    return "\n\n".join(
        text if text.startswith((" ", "-", ">>>")) else " ".join(text.split("\n")) for text in paragraphs
    )


def _setting(item: ParameterDescription) -> str:
    return f"{item['name'].replace('_', '-')}={item['default']}"

"""``kvscope policies``: every policy, its parameters, what it needs from a trace, and what to cite for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.completion import policy_names, replay_names
from kvscope.cli.options import Json
from kvscope.core.errors import UsageError

PRESSES = "kvpress"  # names the presses of kvpress, which are not registered

if TYPE_CHECKING:
    from kvscope.cli.console import Column
    from kvscope.policies.cited import Source
    from kvscope.policies.describe import ParameterDescription, PolicyDescription


@command("policies", order=140)
@examples(
    "kvscope policies",
    "kvscope policies a2sf --cite",
)
def policies(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME", autocompletion=policy_names, help="Describe these policies in full.", show_default=False
        ),
    ] = None,
    cite: Annotated[
        bool,
        typer.Option("--cite", help="Print the publications of all policies, or of NAME, as BibTeX."),
    ] = False,
    replay: Annotated[
        str | None,
        typer.Option(
            "--replay",
            metavar="REPLAY",
            autocompletion=replay_names,
            help="With --cite: print those of the policies in this replay.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the policies, describe some in full, or print what to cite for them."""
    from kvscope.cli import console
    from kvscope.policies import POLICIES
    from kvscope.policies.describe import describe

    if replay is not None and (names or not cite):
        what = "--replay and names of policies exclude each other" if names else "--replay is only for --cite"
        raise UsageError(what, "Write: kvscope policies --cite --replay REPLAY")
    if cite:
        _cite(names or [], replay, json)
        return
    if names and PRESSES in names:
        _show_presses(names, json)
        return
    rows = [row for name in dict.fromkeys(names) for row in describe(name)] if names else describe()
    for broken, why in POLICIES.broken.items():
        console.warn(f"policy {broken} is installed but cannot be loaded: {why}")
    if json:
        console.show_json(rows[0] if names and len(rows) == 1 else rows)
    elif not names:
        console.show_table(
            columns(rows),
            notes=[
                "kvscope policies NAME describes one policy. Set a parameter with --NAME VALUE, such as --alpha 0.7.",
                "Write presses of kvpress as in Python: --policy 'kvpress:SnapKVPress(window_size=32)'. "
                "kvscope policies kvpress lists them.",
            ],
        )
    for number, row in enumerate(rows if names and not json else ()):
        if number:
            console.show_text("")
        _show_one(row)


def _show_presses(names: Sequence[str], json: bool) -> None:
    """Print the presses of kvpress that can be followed, and those that are refused."""
    from kvscope.cli import console
    from kvscope.presses.support import REFUSED, describe_presses

    if len(names) > 1:
        raise UsageError(
            f"{PRESSES} cannot be described together with other policies", "Write: kvscope policies kvpress"
        )
    rows = describe_presses()
    if json:
        refused = [{"press": name, "why": why, "instead": todo} for name, (why, todo) in REFUSED.items()]
        console.show_json({"followed": rows, "refused": refused})
        return
    heads = (("press", 20), ("kind", 10), ("budget", 15))
    columns = [console.Column(head, [row[head] for row in rows], wrap=34, keep=keep) for head, keep in heads]
    console.show_table(
        [*columns, console.Column("example", [in_lines(row["example"], 48) for row in rows], keep=18)],
        notes=[
            "Write one as a policy: kvscope replay --policy 'kvpress:SnapKVPress(window_size=32)'. A ratio in the "
            "press replaces the budget.",
            "Presses need pip install 'kvscope[kvpress]' and the model of the trace; see docs/kvpress.md.",
        ],
    )
    console.show_text("")
    console.show_table(
        [
            console.Column("refused", list(REFUSED)),
            console.Column("it", [why for why, _ in REFUSED.values()], wrap=50),
            console.Column("instead", [todo for _, todo in REFUSED.values()], wrap=40),
        ]
    )


def in_lines(call: str, width: int) -> str:
    """Return a call of Python in lines of a width, broken after ``(``, ``[`` and commas alone."""
    lines = [""]
    for part in re.findall(r"[^(\[,]*(?:[(\[,] ?|$)", call):
        if len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def _cite(names: Sequence[str], replay: str | None, json: bool) -> None:
    """Print what to cite for the named policies, those of a replay, or all."""
    from kvscope.cli import console
    from kvscope.policies.citation import bibtex

    sources = _sources(names, replay)
    if json:
        console.show_json(
            [{"policy": one.policy, "citation": one.citation and asdict(one.citation)} for one in sources]
        )
    else:
        console.show_raw(bibtex(one.citation for one in sources if one.citation is not None))
    unknown = [one.policy for one in sources if not one.known]
    if unknown:
        console.warn(f"not cited, because they are not installed: {', '.join(unknown)}")
    without = [one.policy for one in sources if one.known and one.citation is None]
    if without:
        console.note(f"without a publication: {', '.join(without)}")


def _sources(names: Sequence[str], replay: str | None) -> list[Source]:
    from kvscope.policies.cited import cited_by, cited_by_all, cited_in
    from kvscope.policies.spec import parse_policies

    if replay is None:
        return cited_by(parse_policies(names)) if names else cited_by_all()
    from kvscope.cli.places import find_replay
    from kvscope.results.store import open_replay

    runs = open_replay(find_replay(replay)).info.runs
    found = [source for run in runs for source in cited_in(run.policy, run.label, run.params, run.allocate)]
    return list(dict.fromkeys(found))


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
            ("rule", row["formula"] or "-"),
            ("needs", ", ".join(row["needs"]) or "only the length of the trace"),
            ("decides per", row["scope"].replace("_", " ")),
            ("evicts", _evicts(row)),
            ("budget", "as given" if row["bounded"] else "ignored: the policy itself decides how many keys it retains"),
            ("allocation", row["allocate"]),
            ("prefill", ", ".join(row["prefills"])),
            ("variants", ", ".join(row["variants"]) or "none"),
            ("from", row["paper"]),
            ("compared with", row["proven"] or "the contract of every policy"),
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

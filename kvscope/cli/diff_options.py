"""The options of `diff`."""

from __future__ import annotations

from typing import Annotated

import typer

from kvscope.cli.completion import replay_names
from kvscope.core.options import DiffFormat

DiffBase = Annotated[
    str,
    typer.Argument(
        metavar="BASE",
        autocompletion=replay_names,
        help="Compare with this replay (name, folder or address) or summary.json.",
    ),
]
DiffNew = Annotated[
    str, typer.Argument(metavar="NEW", autocompletion=replay_names, help="Compare this later replay or summary.json.")
]
AllowedChange = Annotated[
    list[str] | None,
    typer.Option(
        "--tolerance",
        "-t",
        metavar="[METRIC=]AMOUNT",
        help="Allow a metric to become worse by 0.01 or 1%; without METRIC, allow it for all. Repeatable. Default: "
        "0.001.",
        show_default=False,
    ),
]
WithDecisions = Annotated[
    bool, typer.Option("--decisions", help="Also compare which keys were evicted, and when; any difference fails.")
]
ListedChanges = Annotated[
    int, typer.Option("--first", metavar="N", help="With --decisions: list the first N differences of each run.", min=0)
]
UpdateBase = Annotated[
    bool, typer.Option("--update", help="Accept NEW: write its summary to BASE, a .json file, and exit with status 0.")
]
DiffForm = Annotated[
    DiffFormat, typer.Option("--format", help="Print text, markdown, json, or junit (XML for test reports).")
]
UnchangedToo = Annotated[bool, typer.Option("--all", help="Show unchanged values too.")]

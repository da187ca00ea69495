"""Options of commands that print a summary table: its order, its rows and its columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from kvscope.cli.completion import metric_names

Sort = Annotated[
    str | None,
    typer.Option(
        "--sort",
        metavar="METRIC",
        autocompletion=metric_names,
        help="Sort by this metric within each budget, the best first.",
    ),
]
Top = Annotated[int | None, typer.Option("--top", metavar="N", min=1, help="Print the first N rows of each budget.")]
Columns = Annotated[
    str | None, typer.Option("--columns", metavar="NAMES", help="Print these columns: read,held,retained_mass.")
]
Wide = Annotated[bool, typer.Option("--wide", help="Print every column, even if the table is wider than the terminal.")]


@dataclass(frozen=True)
class TableOptions:
    """How a summary table is printed; the fields are those of the options."""

    sort: str | None = None
    top: int | None = None
    columns: str | None = None
    wide: bool = False

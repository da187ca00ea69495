"""The page that ``--help`` prints: what a command does, examples, and its options in panels.

Nothing here reads Markdown: the library that does takes a fifth of the time of ``kvscope --help``.
"""

from __future__ import annotations

from enum import Enum
from inspect import cleandoc
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.box import ROUNDED
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kvscope.cli.panels import OTHER, PANELS, panel_of

if TYPE_CHECKING:
    from typer._click import Context
    from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

    Shown: TypeAlias = TyperCommand | TyperGroup
    Parameter: TypeAlias = TyperOption | TyperArgument

WIDEST = 100  # columns; longer lines are hard to read
KINDS = {"int": "N", "float": "NUMBER", "str": "TEXT", "path": "PATH"}  # what an option takes, where it does not say


def show_help(command: Shown, context: Context) -> None:
    """Print the page of a command or of a group of commands."""
    from kvscope.cli.console import stdout

    console = stdout()
    console.width = min(console.width, WIDEST)
    text, examples = cleandoc(command.help or ""), examples_of(command)
    pieces = [piece.replace("{", "").replace("}", "") for piece in command.collect_usage_pieces(context)]
    usage = " ".join([context.command_path, *pieces]).replace("......", "...")
    console.print(Text(f"\nUsage: {usage}\n", "bold"))
    for paragraph in text.split("\n\n"):
        console.print(Text(f"{' '.join(paragraph.split())}\n"))
    if examples:
        console.print(_panel("Examples", Text("\n".join(examples))))
    for title, parameters in _panels(command.get_params(context)).items():
        console.print(_panel(title, _table([_row(one) for one in parameters])))
    commands = [(name, one) for name, one in getattr(command, "commands", {}).items() if not one.hidden]
    if commands:
        rows = [(Text(name, "bold cyan"), Text(_first(one.help or ""))) for name, one in commands]
        console.print(_panel("Commands", _table(rows)))
    if command.epilog:
        console.print(Text(f"{command.epilog}\n"))


def examples_of(command: Shown) -> tuple[str, ...]:
    """Return the examples of a command; a group has none."""
    found: tuple[str, ...] = getattr(command.callback, "examples", ())
    return found


def _first(text: str) -> str:
    """Return the first paragraph of a docstring on one line."""
    return " ".join(cleandoc(text).partition("\n\n")[0].split())


def _panels(parameters: list[Any]) -> dict[str, list[Parameter]]:
    """Return the parameters by title, in the order of `PANELS`."""
    found: dict[str, list[Parameter]] = {title: [] for title in ("Arguments", *PANELS, OTHER)}
    for one in parameters:
        if one.name != "ctx" and not getattr(one, "hidden", False):
            found["Arguments" if one.param_type_name == "argument" else panel_of(one.name)].append(one)
    return {title: members for title, members in found.items() if members}


def _row(one: Parameter) -> tuple[Text, Text]:
    """Return the flags of a parameter with what it takes, and its help with the default."""
    if one.param_type_name == "argument":
        name = Text(one.metavar or one.name.upper(), "bold cyan")
    else:
        flags = [*sorted(one.opts, key=len, reverse=True), *one.secondary_opts]
        name = Text(", ".join(flags), "bold cyan")
        if not getattr(one, "is_flag", False):
            name.append(f" {takes(one)}", "yellow")
    text = Text(one.help or "")
    default = _default(one)
    if one.required:
        text.append(" Required.", "red")
    elif default:
        text.append(f" Default: {default}.", "dim")
    return name, text


def takes(one: Parameter) -> str:
    """Return what an option takes: its own word, its choices, or one for its type."""
    if one.metavar is not None:
        return str(one.metavar)
    shown = str(one.display_type_rich(None))  # type: ignore[arg-type]  # the context is not used
    kind = shown.strip("<>").removeprefix("list[").rstrip("].").partition(" ")[0]
    return KINDS.get(kind.lower(), kind)


def _default(one: Parameter) -> str:
    value = one.default.value if isinstance(one.default, Enum) else one.default
    if one.show_default is False or value is None or isinstance(value, bool) or callable(value) or value in ("", ()):
        return ""
    return "" if "Default:" in (one.help or "") else str(value)


def _table(rows: list[tuple[Text, Text]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0), expand=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    for name, text in rows:
        table.add_row(name, text)
    return table


def _panel(title: str, body: Table | Text) -> Panel:
    return Panel(body, box=ROUNDED, title=Text(title), title_align="left", border_style="dim")

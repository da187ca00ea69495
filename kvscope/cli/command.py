"""Registration of commands: ``@command("name", order=...)`` above a function of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import typer

from kvscope.cli.typer_classes import HelpCommand, HelpGroup, OpenCommand
from kvscope.core.registry import Registry

Run = TypeVar("Run", bound=Callable[..., None])


@dataclass(frozen=True)
class Command:
    """One command of ``kvscope``.

    Attributes
    ----------
    name : str
        What the user types.
    order : int
        The help lists commands from the smallest order to the largest, then groups of commands.
    run : callable or typer.Typer
        The function with its options, or a group of commands.
    epilog, options_metavar, extra_arguments
        As in `command`.
    """

    name: str
    order: int
    run: Callable[..., None] | typer.Typer
    epilog: str | None = None
    options_metavar: str = "[OPTIONS]"
    extra_arguments: bool = False


COMMANDS: Registry[Command] = Registry("command", package="kvscope.cli")


def command(
    name: str,
    *,
    order: int,
    epilog: str | None = None,
    options_metavar: str = "[OPTIONS]",
    extra_arguments: bool = False,
) -> Callable[[Run], Run]:
    """Return a decorator that makes a function a command.

    Parameters
    ----------
    name : str
        What the user types.
    order : int
        Position in the help; leave gaps of ten.
    epilog : str, optional
        Text below the options in the command's help.
    options_metavar : str
        What the usage line shows for the options.
    extra_arguments : bool
        Whether to accept options that it does not declare, in ``ctx.args``: parameters of policies.
    """

    def register(run: Run) -> Run:
        declared = Command(name, order, run, epilog, options_metavar, extra_arguments)
        COMMANDS.register(name, declared, source=run)
        return run

    return register


def examples(*lines: str) -> Callable[[Run], Run]:
    """Return a decorator, below that of the command, with examples for its help: whole commands of one line."""

    def add(run: Run) -> Run:
        run.__dict__["examples"] = lines
        return run

    return add


def command_group(name: str, *, order: int, help: str) -> typer.Typer:
    """Return a new group of commands, ``kvscope NAME COMMAND``, to which its module adds the commands."""
    group = typer.Typer(cls=HelpGroup, help=help, no_args_is_help=True, rich_markup_mode=None)
    COMMANDS.register(name, Command(name, order, group))
    return group


def add_commands(app: typer.Typer, words: Sequence[str] | None = None) -> None:
    """Add every command of this package to `app`, sorted by `Command.order`.

    With `words`, a command that is not among them has its help, but none of its options, and a group no commands.
    """
    for each in sorted((member for _, member in COMMANDS.items()), key=lambda member: member.order):
        typed = words is None or each.name in words
        if isinstance(each.run, typer.Typer):
            app.add_typer(each.run if typed else _empty(each.run), name=each.name)
        else:
            extra = {"ignore_unknown_options": True, "allow_extra_args": True} if each.extra_arguments else None
            app.command(
                each.name,
                cls=OpenCommand if each.extra_arguments else HelpCommand,
                help=each.run.__doc__,
                epilog=each.epilog,
                options_metavar=each.options_metavar,
                context_settings=extra,
            )(each.run if typed else _nothing)


def _empty(group: typer.Typer) -> typer.Typer:
    """Return a group with the help of another one and no commands."""
    return typer.Typer(cls=HelpGroup, help=group.info.help, rich_markup_mode=None)


def _nothing() -> None:
    """Stand for a command that is not called."""

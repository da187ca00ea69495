"""Typer's commands and groups, with the help of this program and its errors for misspelt options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typer.core import TyperCommand, TyperGroup

from kvscope.cli.completion import trace_names
from kvscope.cli.misspelt import flags_of, require_spelt

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter
    from typer._click.shell_completion import CompletionItem


class HelpCommand(TyperCommand):
    """A command whose help is in panels."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Print the help; nothing is left for Typer's formatter."""
        from kvscope.cli.help_page import show_help

        show_help(self, ctx)


class HelpGroup(TyperGroup):
    """A group of commands whose help is in panels."""

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Print the help; nothing is left for Typer's formatter."""
        from kvscope.cli.help_page import show_help

        show_help(self, ctx)


class OpenCommand(HelpCommand):
    """A command whose other options are parameters of policies; a misspelt option of its own is refused first."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Return what Typer does not know.

        Raises
        ------
        UsageError
            For a flag that is similar to an option of the command, and a parameter of no policy.
        """
        if not ctx.resilient_parsing:
            require_spelt(args, flags_of(self.get_params(ctx)))
        return super().parse_args(ctx, args)

    def shell_complete(self, ctx: Context, incomplete: str) -> list[CompletionItem]:
        """Return options, or the names of traces, which these commands take without declaring an argument."""
        from typer._click.shell_completion import CompletionItem

        if incomplete.startswith("-") or any(one.param_type_name == "argument" for one in self.params):
            return super().shell_complete(ctx, incomplete)
        return [CompletionItem(name) for name in trace_names(incomplete)]

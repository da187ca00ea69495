"""Policies, their parameters and budgets, as a command line names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import typer

    from kvscope.core.budget import Budget
    from kvscope.policies import Policy

PARAMETERS = (
    "Any other --NAME VALUE sets a parameter, such as --alpha 0.7, for every selected policy that has it; 'kvscope "
    "policies' lists the parameters. --policy a2sf:alpha=0.7,recent=16 sets parameters of one policy."
)


@dataclass(frozen=True)
class Selection:
    """What a command line selects.

    Attributes
    ----------
    words : list of str
        Arguments that are neither options nor parameters of policies.
    policies : list of Policy
        Instances with their parameters.
    budgets : list of Budget
        Each policy runs under each of them.
    name : str
        Part of the name of the results folder: names of the policies, or ``all``.
    everything : bool
        Whether ``all`` was named: policies that cannot run are then skipped.
    """

    words: list[str]
    policies: list[Policy]
    budgets: list[Budget]
    name: str
    everything: bool


def select(
    ctx: typer.Context,
    words: Sequence[str],
    policies: Sequence[str] | None,
    budgets: Sequence[str] | None,
    *,
    quiet: bool = False,
) -> Selection:
    """Return what a command line selects: its options, and the arguments that Typer does not know.

    Raises
    ------
    UsageError
        For an unknown name, parameter or budget, or if no policy is given.
    """
    from kvscope.cli import places
    from kvscope.cli.console import note
    from kvscope.core.budget import parse_budgets

    arguments, params = split(words)
    specs = list(policies or ())
    chosen = named_policies(specs, params, options_of(ctx))
    limits = parse_budgets(",".join(budgets) if budgets else "20%")
    if not budgets:
        note("budget: 20% (the default)", quiet=quiet)
    name = "all" if "all" in specs else places.joined(list(dict.fromkeys(item.name for item in chosen)))
    return Selection(arguments, chosen, limits, name, "all" in specs)


def only_word(words: Sequence[str]) -> str | None:
    """Return the trace that is named, or None; raises UsageError for two."""
    from kvscope.core.errors import UsageError

    if len(words) > 1:
        raise UsageError(f"two traces are given: {words[0]} and {words[1]}", "Name one trace.")
    return words[0] if words else None


def options_of(ctx: typer.Context) -> list[str]:
    """Return the flags that the command declares."""
    return [flag for item in ctx.command.params for flag in item.opts]


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the arguments that are no flags, and policy parameters, among those that Typer does not know.

    Raises
    ------
    UsageError
        For a flag without a value, or a flag given twice.
    """
    from kvscope.core.errors import UsageError

    words: list[str] = []
    params: dict[str, str] = {}
    remaining = list(arguments)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("-") or word == "-":
            words.append(word)
            continue
        name, equals, value = word.partition("=")
        if not name.startswith("--") or len(name) == 2:
            raise UsageError(f"unknown option {name}", "See --help for options, and kvscope policies for parameters.")
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                raise UsageError(f"{name} has no value", f"Write {name} VALUE; kvscope policies lists the parameters.")
            value = remaining.pop(0)
        key = name.removeprefix("--").replace("-", "_")
        if key in params:
            raise UsageError(f"{name} is given twice", "Set it for one policy with --policy NAME:parameter=value")
        params[key] = value
    return words, params


def _require_parameters(params: Iterable[str]) -> None:
    """Raise UsageError for a flag that sets a parameter of no policy."""
    from kvscope.cli.misspelt import policy_parameters
    from kvscope.core.errors import UsageError
    from kvscope.core.registry import nearest

    known = policy_parameters()
    for flag in (flag_of(name) for name in params):
        if flag not in known:
            raise UsageError(f"unknown option {flag}", nearest(flag, known))


def flag_of(name: str) -> str:
    """Return the flag that sets a parameter."""
    return "--" + name.replace("_", "-")


def named_policies(specs: Sequence[str], params: dict[str, str], flags: Sequence[str]) -> list[Policy]:
    """Return the policies that are named; the error for an unknown parameter suggests a similar option of `flags`."""
    import difflib

    from kvscope.core.errors import UsageError
    from kvscope.policies import POLICIES
    from kvscope.policies.spec import parse_policies

    if not specs:
        _require_parameters(params)
        raise UsageError(
            "no policy is given",
            f"Name one or more: --policy {' --policy '.join(POLICIES.names()[:2])}, or --policy all",
        )
    names = [name for spec in specs for name in (POLICIES.names() if spec == "all" else [spec])]
    try:
        return parse_policies(names, params)
    except UsageError as error:
        for flag in map(flag_of, params):
            close = difflib.get_close_matches(flag, flags, n=1, cutoff=0.75)
            if close and flag in error.what:
                raise UsageError(error.what, f"Did you mean {close[0]}?") from None
        raise

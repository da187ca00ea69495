"""Options and commands that do not exist: the error names each, and the nearest one that does."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from kvscope.core.errors import UsageError

if TYPE_CHECKING:
    import typer

CLOSE = 0.75  # similarity from which an option is suggested, as difflib measures it


def misspelt(error: typer.TyperException) -> tuple[str, str] | None:
    """Return the two lines for an option or a command that Typer does not know; None for its other errors."""
    command = getattr(getattr(error, "ctx", None), "command", None)
    name = getattr(error, "option_name", None)
    if command is None or getattr(error, "possibilities", False) is False:
        return _command(error, getattr(command, "commands", {}))
    flags = flags_of(command.params)
    near = list(dict.fromkeys([*nearestflags_of(str(name), flags), *(getattr(error, "possibilities", None) or ())]))
    return f"unknown option {name}", f"Did you mean {' or '.join(near)}?" if near else help_hint(error)


def nearestflags_of(name: str, flags: Iterable[str]) -> list[str]:
    """Return the option that is most similar to a name, or nothing."""
    return difflib.get_close_matches(name, list(flags), n=1, cutoff=CLOSE)


def require_spelt(arguments: Sequence[str], flags: Sequence[str]) -> None:
    """Raise UsageError for a flag that is similar to one of `flags`, and a parameter of no policy.

    Policies of a user's file may have any parameter: with one of these, only what it refuses is an error.
    """
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    words = [word.partition("=")[0] for word in arguments[:end] if word.startswith("--")]
    for word in words:
        near = nearestflags_of(word, flags)
        if word in flags or not near or any(".py:" in argument for argument in arguments):
            continue
        if word.replace("_", "-") not in policy_parameters():
            raise UsageError(f"unknown option {word}", f"Did you mean {near[0]}?")


def policy_parameters() -> list[str]:
    """Return the flags that set parameters of registered policies."""
    from kvscope.policies import POLICIES
    from kvscope.policies.parameters import all_parameters_of

    names = {name for _, cls in POLICIES.items() for name in all_parameters_of(cls)}
    return sorted("--" + name.replace("_", "-") for name in names)


def flags_of(params: Iterable[object]) -> list[str]:
    """Return the long flags of parameters."""
    return [flag for item in params for flag in getattr(item, "opts", ()) if flag.startswith("--")]


def _command(error: typer.TyperException, commands: Iterable[str]) -> tuple[str, str] | None:
    """Return the lines for an unknown command of a group."""
    message = error.format_message()
    if not message.startswith("No such command "):
        return None
    name = message.removeprefix("No such command ").split("'")[1]
    near = difflib.get_close_matches(name, list(commands), n=1, cutoff=0.5)
    return f"unknown command {name}", f"Did you mean {near[0]}?" if near else help_hint(error)


def help_hint(error: typer.TyperException) -> str:
    """Return the line that names the help of the command in which an error occurred."""
    context = getattr(error, "ctx", None)
    return f"See: {context.command_path if context else 'kvscope'} --help"

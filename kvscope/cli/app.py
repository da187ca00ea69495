"""The command ``kvscope``: wires the commands together, and turns errors into two lines and an exit status.

Exit status: 0 fine, 1 an error that the message explains, 2 usage, 3 `diff` found a regression, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kvscope.cli.command import add_commands
from kvscope.core.errors import ExitStatus, KvscopeError
from kvscope.core.version import __version__

app = typer.Typer(
    name="kvscope",
    help="Record a model's attention, replay KV-cache eviction policies over it, see what each one loses.",
    epilog="First steps: kvscope demo. Then: kvscope trace --model demo prompt.txt",
    no_args_is_help=True,
    rich_markup_mode="markdown",  # paragraphs of a docstring flow into the width of the terminal
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
add_commands(app)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kvscope {__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Record a model's attention, replay KV-cache eviction policies over it, see what each one loses."""


def main() -> None:
    """Run the command line of this process and exit."""
    # A replay is many small steps: threads that spin while they wait make it several times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Return the exit status of one command; a user's mistake prints two lines, ours its traceback."""
    from kvscope.cli import console

    try:
        status = app(args=list(arguments), prog_name="kvscope", standalone_mode=False, obj=list(arguments))
        sys.stdout.flush()
    except KvscopeError as error:
        console.fail(error.what, error.todo)
        return error.exit_status
    except typer.TyperException as error:
        if error.format_message():  # a bare `kvscope` has printed its help, and nothing is left to say
            console.fail(error.format_message(), _help_hint(error))
        return int(error.exit_code)
    except KeyboardInterrupt:
        status = ExitStatus.interrupted
    except BrokenPipeError:  # the reader of a pipe left early; nobody is there to be told, also not at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitStatus.error
    except OSError as error:
        explained = _explain(error)
        if explained is None:
            raise
        console.fail(*explained)
        return ExitStatus.error
    if status == ExitStatus.interrupted:
        console.fail("interrupted", "What was half written ends in .incomplete and can be deleted.")
    return status if isinstance(status, int) else ExitStatus.ok


_OS_ERRORS = {
    errno.EACCES: "Check the permissions, or work in a folder that you may write to.",
    errno.EPERM: "Check the permissions, or work in a folder that you may write to.",
    errno.EROFS: "This file system is read-only: work in another folder.",
    errno.ENOSPC: "Free some space, or write to another disk with -o.",
    errno.EDQUOT: "Free some space, or write to another disk with -o.",
    errno.ENOTDIR: "A file stands where a folder is needed: move it away, or write elsewhere with -o.",
    errno.EEXIST: "A file stands where a folder is needed: move it away, or write elsewhere with -o.",
    errno.EISDIR: "A file is needed here, and this is a folder.",
    errno.ENOENT: "Check the path.",
    errno.ENAMETOOLONG: "Use a shorter name.",
    errno.ELOOP: "A link points to itself: use another path.",
}


def _explain(error: OSError) -> tuple[str, str] | None:
    """Return the two lines for an error of the file system, or None if it is a defect of ours."""
    todo = _OS_ERRORS.get(error.errno or 0)
    if todo is None:
        return None
    name = error.filename2 or error.filename
    if name is None:
        return str(error), todo
    path = Path(os.fsdecode(name)) if isinstance(name, (str, bytes)) else Path(str(name))
    if Path(__file__).parent.parent in path.resolve().parents:
        return None
    return f"{path}: {os.strerror(error.errno or 0)}", todo


def _help_hint(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    return f"See: {context.command_path if context else 'kvscope'} --help"

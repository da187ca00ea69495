"""The program ``kvscope``: runs one command and turns errors into two lines and an exit status.

Exit status: 0 success, 1 an error that the message explains, 2 wrong usage, 3 `diff` found a regression or `verify` a
difference, 130 interrupted.
"""

from __future__ import annotations

import _thread
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Timer
from typing import Annotated

import typer

from kvscope.cli.command import add_commands
from kvscope.cli.misspelt import help_hint, misspelt
from kvscope.cli.streams import discard_stdout, open_streams
from kvscope.cli.typer_classes import HelpGroup
from kvscope.core.errors import ExitStatus, KvscopeError
from kvscope.core.memory import LimitedImports, is_library_too_large, is_out_of_memory, out_of_memory
from kvscope.core.own_code import own_place
from kvscope.core.version import __version__


def _version(requested: bool) -> None:
    if requested:
        print(f"kvscope {__version__}")  # noqa: T201
        raise typer.Exit


def program(words: Sequence[str] | None = None) -> typer.Typer:
    """Return the program with all its commands.

    Parameters
    ----------
    words : sequence of str, optional
        The words of a command line: only a command that is among them has its options, since to read those of every
        command takes a seventh of the time of ``kvscope --help``. Without them, every command has its options.
    """
    app = typer.Typer(
        name="kvscope",
        help="Record a model's attention, replay KV-cache eviction policies over it, see what each one loses.",
        epilog="First steps: kvscope demo. Then, with any text file: kvscope trace --model demo FILE",
        no_args_is_help=True,
        cls=HelpGroup,
        rich_markup_mode=None,  # `kvscope.cli.help_page` draws the help
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_options)
    add_commands(app, words)
    return app


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Record a model's attention, replay KV-cache eviction policies over it, see what each one loses."""


def main() -> None:
    """Run the command line of this process and exit."""
    # A replay is many small steps: threads that spin while they wait make it several times slower on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded
    prepare_process()
    sys.exit(run(sys.argv[1:]))


def prepare_process() -> None:
    """Make the streams of this process usable, its interruptions certain, and a lack of memory for torch an error."""
    open_streams()
    sys.unraisablehook = _interrupt_again
    sys.meta_path.insert(0, LimitedImports())


def _interrupt_again(found: sys.UnraisableHookArgs) -> None:
    """Interrupt once more where Python cannot raise an interruption, as in a destructor: it prints it and goes on."""
    if found.exc_type is KeyboardInterrupt:
        Timer(0.02, _thread.interrupt_main).start()  # once that destructor has returned
    else:
        sys.__unraisablehook__(found)


def run(arguments: Sequence[str]) -> int:
    """Return the exit status of one command; a user error prints two lines, a defect of kvscope its traceback."""
    from kvscope.cli import console

    try:
        Path.cwd()  # without a current folder, the libraries of torch end the process
    except FileNotFoundError:
        console.fail("the current folder was deleted", "Change to a folder that exists: cd")
        return ExitStatus.error
    try:
        app = program(None if "_KVSCOPE_COMPLETE" in os.environ else arguments)
        status = app(args=list(arguments), prog_name="kvscope", standalone_mode=False, obj=list(arguments))
        sys.stdout.flush()
    except KvscopeError as error:
        console.fail(error.what, error.todo)
        return error.exit_status
    except typer.TyperException as error:
        if error.format_message():  # empty after a bare `kvscope`, which has printed its help
            console.fail(*(misspelt(error) or (error.format_message(), help_hint(error))))
        return int(error.exit_code)
    except KeyboardInterrupt:
        status = ExitStatus.interrupted
    except BrokenPipeError:  # the reader closed the pipe: nothing can be printed, at exit either
        discard_stdout()
        return ExitStatus.error
    except (Exception, SystemExit) as error:  # sys.exit inside a policy must not end a replay with status 0
        explained = _explain(error)
        if explained is None:
            raise
        console.fail(*explained)
        return ExitStatus.error
    if status == ExitStatus.interrupted:
        console.fail("interrupted", "Incomplete output was removed; older output is unchanged.")
    return status if isinstance(status, int) else ExitStatus.ok


_OS_ERRORS = {
    errno.EACCES: "Check the permissions, or work in a folder that you may write to.",
    errno.EPERM: "Check the permissions, or work in a folder that you may write to.",
    errno.EROFS: "Work in another folder: this file system is read-only.",
    errno.ENOSPC: "Free some space, or write to another disk with -o.",
    errno.EDQUOT: "Free some space, or write to another disk with -o.",
    errno.ENOTDIR: "A file has the name of a folder to make: move the file, or write elsewhere with -o.",
    errno.EEXIST: "A file has the name of a folder to make: move the file, or write elsewhere with -o.",
    errno.EISDIR: "Name a file: this is a folder.",
    errno.ENOENT: "Check the path.",
    errno.ENAMETOOLONG: "Use a shorter name.",
    errno.ELOOP: "Use another path: this link points to itself.",
    errno.EFBIG: "Raise the limit of file sizes: ulimit -f unlimited",
    errno.EMFILE: "Raise the limit of open files: ulimit -n 4096",
    errno.ENFILE: "Close other programs: no more files can be opened on this machine.",
    errno.EIO: "Check the disk: it does not read or write this file.",
    errno.ESTALE: "Connect the network file system again.",
    errno.EBUSY: "Close the program that uses this file.",
    errno.ETXTBSY: "Close the program that uses this file.",
    errno.EXDEV: "Name a path on one disk.",
    errno.EINVAL: "Use another path: this file system does not accept it.",
    errno.EILSEQ: "Use another name: this file system does not accept it.",
}
_OF_PACKAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)  # of a file of kvscope itself, they are a defect


def _explain(error: Exception | SystemExit) -> tuple[str, str] | None:
    """Return the two lines for an error of memory, of a user's code or of the file system; None for kvscope's own."""
    if is_library_too_large(error):
        return (
            "there is too little memory to load the libraries",
            "Raise the limit: ulimit -v unlimited, or 4 GB and more.",
        )
    if is_out_of_memory(error):
        exceeded = out_of_memory(error)
        return exceeded.what, exceeded.todo
    place = own_place(error.__traceback__)
    if place is not None:
        what = "sys.exit was called" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        return f"your {place}: {what}", "Correct it, then run the command again."
    if not isinstance(error, OSError):
        return None
    todo = _OS_ERRORS.get(error.errno or 0)
    if todo is None:
        return None
    name = error.filename2 or error.filename
    if name is None:  # a stream, not a file
        discard_stdout()
        return f"cannot write the output: {os.strerror(error.errno or 0)}", todo
    path = Path(os.fsdecode(name)) if isinstance(name, (str, bytes)) else Path(str(name))
    if error.errno in _OF_PACKAGE and Path(__file__).parent.parent in path.resolve().parents:
        return None
    return f"{path}: {os.strerror(error.errno or 0)}", todo

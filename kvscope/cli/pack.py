"""``kvscope pack``: write a trace or a replay into one file, to send it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.completion import either_names
from kvscope.cli.options import Force, Json, Quiet

if TYPE_CHECKING:
    from kvscope.sharing.pack import Packed


@command("pack", order=163)
@examples(
    "kvscope pack my-trace",
    "kvscope pack my-replay -o my-replay.tar",
)
def pack(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            autocompletion=either_names,
            help="Pack this trace or replay: a name under traces/ or reports/, or a path.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write this file. Default: NAME.kvscope.tar."),
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a trace or a replay into one file with checksums; the same content gives the same bytes.

    kvscope unpack restores the folder, and every command can read the file from s3://, hf:// or https://.
    """
    from kvscope.cli import console, places
    from kvscope.sharing.archive import ENDING, SUFFIX
    from kvscope.sharing.kinds import KINDS
    from kvscope.sharing.pack import pack as write

    folder, noun = places.find_either(name, quiet=quiet)
    file = output or Path(f"{places.readable(folder.resolve().name)}{SUFFIX}")
    with console.counted(f"packing {folder}", quiet=quiet) as count:
        made = write(folder, KINDS[noun], file, force=force, progress_callback=count)
    show(made, as_json=json)
    if file.suffix != ENDING:
        console.note(f"to read it from an address, give it a name ending in {ENDING}", quiet=quiet)
    console.note(f"next: send {file}; the receiver runs kvscope unpack {file.name}", quiet=quiet)


def show(made: Packed, *, as_json: bool) -> None:
    """Print what was packed."""
    from kvscope.cli import console
    from kvscope.core.output import size

    content, files = made.record.content, len(made.record.files)
    if as_json:
        facts = {"file": str(made.path), "content": content, "files": files}
        console.show_json({**facts, "bytes": made.bytes, "sha256": made.sha256})
        return
    console.show_pairs(
        [("content", f"{content}, {files} files"), ("size", size(made.bytes)), ("sha256", made.sha256)],
        title=str(made.path),
    )

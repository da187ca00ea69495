"""``kvscope unpack``: make a folder of a packed trace or replay."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.cli.command import command, examples
from kvscope.cli.options import Force, Json, Quiet

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from kvscope.sharing.copying import Readable


@command("unpack", order=166)
@examples(
    "kvscope unpack my-trace.tar",
    "kvscope unpack my-trace.tar -o copy",
)
def unpack(
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Unpack this file, which kvscope pack wrote: a path or an address.")
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            "--name",
            metavar="NAME",
            help="Write to this name under traces/ or reports/, or path. Default: the name of the file.",
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Unpack a file into a trace under traces/ or a replay under reports/; every byte is checked."""
    from kvscope.cli import console, places
    from kvscope.sharing.fetch import name_of
    from kvscope.sharing.remote import is_remote, shown
    from kvscope.sharing.unpack import PackedFile
    from kvscope.sharing.unpack import unpack as write

    name = shown(file) if is_remote(file) else file
    with _open(file) as stream:
        packed = PackedFile(stream, name)
        own = name_of(file if is_remote(file) else f"file://{Path(file).name}")
        path = places.place(packed.kind.place, output or own, own, force=force)
        with console.counted(f"unpacking {name}", total=packed.record.bytes, quiet=quiet) as count:
            made = write(packed, path, force=force, progress_callback=count)
    content, files = packed.record.content, len(packed.record.files)
    if json:
        console.show_json({"content": content, "path": str(made), "files": files, "sha256": packed.sha256})
    else:
        console.show_pairs(
            [("content", f"{content}, {files} files"), ("sha256 of the file", packed.sha256)], title=str(made)
        )
    console.note(f"next: kvscope {'replay' if content == 'trace' else 'report'} {made}", quiet=quiet)


def _open(file: str) -> AbstractContextManager[Readable]:
    from kvscope.core.errors import ShareError
    from kvscope.sharing.remote import is_remote, opened

    if is_remote(file):
        return opened(file)
    if not Path(file).is_file():
        what = "is not a file" if Path(file).exists() else "does not exist"
        raise ShareError(f"{file} {what}", "Name a file that kvscope pack wrote.")
    return Path(file).open("rb")

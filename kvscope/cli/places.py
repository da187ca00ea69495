"""Where commands read and write: ``traces/NAME`` and ``reports/NAME``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from kvscope.cli.console import counted, note
from kvscope.core.errors import RECORD_ONE, REPLAY_COMMAND, KvscopeError, ResultError, TraceError, UsageError
from kvscope.core.output import incomplete, require_free, writer_of
from kvscope.core.registry import nearest

TRACES = Path("traces")
REPORTS = Path("reports")
PACKED = ".tar"  # ending of a packed file
HEADER = {TRACES: "trace.json", REPORTS: "run.json"}  # file that a complete one has
MAKE = {TRACES: RECORD_ONE, REPORTS: f"Make one: {REPLAY_COMMAND}"}


def find_trace(given: str | None, *, quiet: bool = False) -> Path:
    """Return the folder of a trace: a path, a name under ``traces/``, or the newest complete one, which is printed.

    What an address names, as ``s3://...``, is fetched first, and the folder of its copy is printed.

    Raises
    ------
    TraceError
        If there is none.
    ShareError
        If what an address names cannot be fetched.
    """
    if given is not None and _is_remote(given):
        return _fetched(given, "trace", quiet)[0]
    if given is not None:
        return _find(given, TRACES, "trace", TraceError)
    from kvscope.trace.newest import newest_trace

    path = newest_trace(TRACES)
    note(f"trace: {path} (the newest; name another one to use that)", quiet=quiet)
    return path


def find_replay(given: str | None, *, quiet: bool = False) -> Path:
    """Return a replay: a folder, a ``summary.json``, a name under ``reports/``, or the newest, which is printed.

    What an address names, as ``s3://...``, is fetched first, and the path of its copy is printed.

    Raises
    ------
    ResultError
        If there is none.
    ShareError
        If what an address names cannot be fetched.
    """
    if given is not None and _is_remote(given):
        return _fetched(given, "replay", quiet)[0]
    if given is not None:
        return _find(given, REPORTS, "replay", ResultError)
    from kvscope.results.store import newest_replay

    path = newest_replay(REPORTS)
    note(f"replay: {path} (the newest; name another one to use that)", quiet=quiet)
    return path


def find_either(given: str | None, *, quiet: bool = False) -> tuple[Path, str]:
    """Return a trace or a replay, and which of them it is; of a name that both have, and without a name, the trace."""
    if given is not None and _is_remote(given):
        return _fetched(given, None, quiet)
    if given is not None and (Path(given).is_absolute() or not (TRACES / given).exists()):
        from kvscope.core.records import RUN_FILE

        for path in (Path(given), REPORTS / given):
            if (path / RUN_FILE).is_file():
                return path, "replay"
    return find_trace(given, quiet=quiet), "trace"


def place(folder: Path, given: str | None, name: str, *, force: bool, suffix: str = "") -> Path:
    """Return where to write: the path of the user, or the first free one of ``name``, ``name-2``, ``name-3``, ...

    Parameters
    ----------
    folder : Path
        ``traces`` or ``reports``: a bare name means a folder in it.
    given : str or None
        Name or path from ``-o``.
    name : str
        Name to use otherwise.
    force : bool
        Whether an existing output may be replaced.
    suffix : str
        ``.html`` for a page.

    Raises
    ------
    OutputExists
        If the path of the user exists and `force` is off.
    """
    if given is None:
        stem, number = readable(name), 1
        path = folder / f"{stem}{suffix}"
        while _taken(path):
            number += 1
            path = folder / f"{stem}-{number}{suffix}"
        return path
    if not given.strip():
        raise UsageError("-o is empty", "Name a folder or a path: -o NAME")
    bare = Path(given).name == given and given not in (".", "..")
    path = folder / given if bare else Path(given)
    if suffix and path.suffix != suffix:
        path = path.with_name(path.name + suffix)
    require_free(path, force=force)
    return path


def readable(name: str) -> str:
    """Return `name` as a file name: letters, digits, dots, plus signs and dashes, at most 80 of them."""
    return re.sub(r"[^\w.+]+", "-", name).strip("-.")[:80] or "unnamed"


def joined(names: Sequence[str], most: int = 3) -> str:
    """Return up to `most` names joined, of more names the first and how many follow."""
    return "+".join(names) if len(names) <= most else f"{names[0]}+{len(names) - 1}-more"


def _is_remote(given: str) -> bool:
    from kvscope.sharing.remote import is_remote

    return is_remote(given)


def local_file(given: str, noun: str, *, quiet: bool = False) -> str | Path:
    """Return the path of a file; one at an address is fetched first, and the path of its copy is printed.

    Raises
    ------
    ShareError
        If it cannot be fetched.
    """
    if not _is_remote(given):
        return given
    from kvscope.sharing.fetch import fetch_file
    from kvscope.sharing.remote import shown

    with counted(f"fetching {shown(given)}", quiet=quiet) as count:
        path, fresh = fetch_file(given, progress_callback=count)
    note(f"{noun}: {path} ({'fetched from' if fresh else 'the copy of'} {shown(given)})", quiet=quiet)
    return path


def _fetched(url: str, noun: str | None, quiet: bool) -> tuple[Path, str]:
    """Return the local copy of what is at an address, which is printed, and what it is."""
    from kvscope.sharing.fetch import fetch
    from kvscope.sharing.kinds import KINDS
    from kvscope.sharing.remote import shown

    with counted(f"fetching {shown(url)}", quiet=quiet) as count:
        found = fetch(url, KINDS[noun] if noun else None, progress_callback=count)
    how = "fetched from" if found.fresh else "the copy of"
    note(f"{found.kind.noun}: {found.path} ({how} {shown(url)})", quiet=quiet)
    return found.path, found.kind.noun


def _taken(path: Path) -> bool:
    return path.exists() or path.is_symlink() or writer_of(path) is not None


def _find(given: str, folder: Path, kind: str, error: type[KvscopeError]) -> Path:
    """Return the path `given` if it exists, otherwise the path of that name in the folder, finished or not.

    A complete one has priority: beside ``traces/llama`` there may be a folder ``llama`` with the model.
    """
    for path in sorted((Path(given), folder / given), key=lambda path: not (path / HEADER[folder]).is_file()):
        if path.suffix == PACKED and path.is_file():
            raise error(f"{path} is a packed file", f"Unpack it first: kvscope unpack {path}")
        if path.exists() or incomplete(path).exists():
            return path
    known = [item.name for item in folder.iterdir() if item.is_dir()] if folder.is_dir() else []
    hint = nearest(given, known) if known else f"There is none yet. {MAKE[folder]}"
    raise error(f"no {kind} {given}: neither a path nor a name under {folder}/", hint)

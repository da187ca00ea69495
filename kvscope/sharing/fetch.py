"""Fetch a trace, a replay or a summary from another machine, once: what is fetched is kept in a cache.

A copy is identified by its content: the header of a folder, or the list of a packed file, contains the checksums of
everything else. The header is read each time and determines which copy is used. So what has changed is fetched anew,
even if a server does not report when it changed. Fetched files are compared with their checksums before they get a
name, and again when they are used.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile

from kvscope.core.errors import KvscopeError, ShareError
from kvscope.core.written import first_complete, written_file
from kvscope.sharing.archive import ENDING, SUFFIX, list_bytes
from kvscope.sharing.cache import VARIABLE, cache_explained, place_of, version_of
from kvscope.sharing.copying import PIECE, Hashed, Progress, Readable, copy_file, no_progress, read_up_to, require_room
from kvscope.sharing.kinds import HEADER_BYTES, REPLAY, TRACE, Kind
from kvscope.sharing.remote import NotThere, last_part, member, opened, require_address, shown
from kvscope.sharing.unpack import PackedFile

SUMMARY_ENDING = ".json"
_ROOM = f"Free some space, or name a folder on another disk: {VARIABLE}=FOLDER"


@dataclass(frozen=True)
class Fetched:
    """A copy of what is at an address.

    Attributes
    ----------
    path : Path
        Its folder, or the file of a summary.
    kind : Kind
        What it is.
    fresh : bool
        Whether it was fetched now; otherwise the kept copy has the same content.
    """

    path: Path
    kind: Kind
    fresh: bool


def fetch(url: str, kind: Kind | None = None, *, progress_callback: Progress = no_progress) -> Fetched:
    """Return a local copy of the folder, packed file or ``summary.json`` at an address; it is copied only once.

    Parameters
    ----------
    url : str
        A folder that has ``trace.json`` or ``run.json``, a file whose name ends in ``.tar``, or for replays one that
        ends in ``.json``.
    kind : Kind, optional
        The kind that is required; without it, a trace or a replay.
    progress_callback : callable
        Called with the number of bytes fetched since its last call.

    Raises
    ------
    ShareError
        If the address has nothing, or something of another kind; if it cannot be read or stored, or is damaged.
    KvscopeError
        If its header is damaged, or of a version that cannot be read.
    """
    require_address(url)
    try:
        if last_part(url).endswith(ENDING):
            return _fetch_packed(url, kind, progress_callback)
        if last_part(url).endswith(SUMMARY_ENDING) and kind is REPLAY:
            return _fetch_summary(url)
        return _fetch_folder(url, kind, progress_callback)
    except ShareError as error:
        kept = _newest_kept(url)
        if kept is None or isinstance(error, NotThere):
            raise
        raise ShareError(error.what, f"{error.todo} A copy from before is in {kept}") from error


def fetch_file(url: str, *, progress_callback: Progress = no_progress) -> tuple[Path, bool]:
    """Return the path of a copy of any file at an address, and whether its content is new.

    The file is read each time; a copy of the same content is kept once, in a folder with the name of its own, which
    names the task of some data sets.

    Raises
    ------
    ShareError
        If there is no such file, or it cannot be read or kept.
    """
    require_address(url)
    folder = place_of(url)
    with cache_explained():
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".", delete=False) as file:
            work = Path(file.name)
            try:
                with opened(url) as stream:
                    hashed = Hashed(stream)
                    while piece := hashed.read(PIECE):
                        file.write(piece)
                        progress_callback(len(piece))
            except BaseException:
                work.unlink()
                raise
        path = folder / hashed.sha256[:24] / name_of(url.rstrip("/").rpartition("/")[0]) / name_of(url)
        fresh = not path.is_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        work.replace(path)
    return path, fresh


def name_of(url: str) -> str:
    """Return the name of what is at an address, for a folder: its last part without the ending of a packed file."""
    name = last_part(url).removesuffix(ENDING).removesuffix(SUFFIX.removesuffix(ENDING))
    safe = "".join(each if each.isalnum() or each in "._+-=" else "-" for each in name).strip(".-")
    return safe[:80] or "unnamed"


def _fetch_folder(url: str, kind: Kind | None, progress: Progress) -> Fetched:
    kind, header = _header(url, [kind] if kind is not None else [TRACE, REPLAY])
    files = kind.files(header, shown(url))
    path = place_of(url) / version_of(header) / name_of(url)
    if _kept(path, kind):
        return Fetched(path, kind, False)

    def damaged(why: str) -> ShareError:
        return ShareError(
            f"{kind.noun} {shown(url)} is damaged: {why}", "Fetch it again later, or ask for a whole one."
        )

    with cache_explained(), first_complete(path) as work:
        require_room(work.parent, sum(file.bytes for file in files), _ROOM)
        for file in files:
            with opened(member(url, file.name)) as stream:
                copy_file(stream, work / file.name, file, damaged, progress)
                if stream.read(1):
                    raise damaged(f"{file.name} has more than {file.bytes} bytes")
        (work / kind.header).write_bytes(header)
        kind.open(work)
    return Fetched(path, kind, True)


def _header(url: str, kinds: list[Kind]) -> tuple[Kind, bytes]:
    """Return the first of the kinds whose header is in a remote folder, and that header."""
    for kind in kinds:
        try:
            with opened(member(url, kind.header)) as stream:
                return kind, _all_of(stream, member(url, kind.header))
        except NotThere:
            continue
    nouns = " or ".join(kind.noun for kind in kinds)
    headers = " or ".join(kind.header for kind in kinds)
    raise NotThere(
        f"no {nouns} at {shown(url)}: there is no {headers}",
        f"Name a folder that has one, or a file of kvscope pack, which ends in {ENDING}.",
    )


def _fetch_packed(url: str, kind: Kind | None, progress: Progress) -> Fetched:
    with opened(url) as stream:
        packed = PackedFile(stream, shown(url))
        if kind not in (None, packed.kind):
            raise ShareError(
                f"{shown(url)} has a {packed.kind.noun}, not a {kind.noun if kind else ''}", "Name another."
            )
        path = place_of(url) / version_of(list_bytes(packed.record)) / name_of(url)
        if _kept(path, packed.kind):
            return Fetched(path, packed.kind, False)
        with cache_explained(), first_complete(path) as work:
            packed.copy_to(work, progress)
    return Fetched(path, packed.kind, True)


def _fetch_summary(url: str) -> Fetched:
    """Return the copy of a single file, as a committed ``summary.json``, which has a checksum of itself."""
    with opened(url) as stream:
        content = _all_of(stream, url)
    path = place_of(url) / version_of(content) / f"{name_of(url).removesuffix(SUMMARY_ENDING)}{SUMMARY_ENDING}"
    if path.is_file() and path.read_bytes() == content:
        return Fetched(path, REPLAY, False)
    with cache_explained():
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_file(path) as file:
            file.write(content)
    return Fetched(path, REPLAY, True)


def _all_of(stream: Readable, url: str) -> bytes:
    content = read_up_to(stream, HEADER_BYTES + 1)
    if len(content) > HEADER_BYTES:
        raise ShareError(f"{shown(url)} is larger than {HEADER_BYTES} bytes", "Name the folder of a trace or a replay.")
    return content


def _kept(path: Path, kind: Kind) -> bool:
    """Return whether a whole copy is kept; one that has lost a file is removed, to be fetched again."""
    if not path.is_dir():
        return False
    try:
        kind.open(path)
    except KvscopeError:
        with cache_explained():
            shutil.rmtree(path)
        return False
    return True


def _newest_kept(url: str) -> Path | None:
    """Return the copy of what was at an address that was fetched last."""
    try:
        kept = sorted(place_of(url).glob(f"*/{name_of(url)}"), key=lambda path: path.stat().st_mtime)
    except (OSError, ShareError):
        return None
    return kept[-1] if kept else None

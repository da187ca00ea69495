"""A folder with the files of a tracker, complete or not there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from kvscope.core.errors import ResultError
from kvscope.core.output import OutputFolder
from kvscope.core.trackers import Tracker
from kvscope.results.store import Replay
from kvscope.tracking.runs import TrackedRun, replay_id, tracked_runs

HEADER = "export.json"
Write = Callable[[TrackedRun, Path], None]
Done = Callable[[int], None]


def write_folder(
    replay: Replay, path: Path, tracker: Tracker, members: str, write: Write, *, force: bool, done: Done
) -> list[str]:
    """Write every run of a replay into a new folder, and return the names of the runs.

    Parameters
    ----------
    replay : Replay
        What to export.
    path : Path
        The folder.
    tracker : Tracker
        Whose files they are.
    members : str
        Regular expression of the paths that it may hold beside ``export.json``.
    write : callable
        Writes one run into a folder.
    force : bool
        Whether an earlier export is replaced.
    done : callable
        Called with the number of runs that are written.

    Raises
    ------
    OutputExists
        If there is one and `force` is off: a second one beside it would show every run twice.
    ResultError
        If the folder holds something else, or cannot be written.
    """
    folder = OutputFolder(path, "export", HEADER, rf"export\.json|{members}", ResultError, force)
    about = {"kind": f"kvscope-{tracker}", "replay": str(replay.path), "id": replay_id(replay)}
    names: list[str] = []
    try:
        begun = folder.begin()
        with folder.abandoned_on_error():
            with folder.locked():
                _header(folder.work, about | {"complete": False, "writer": begun})
            for run in tracked_runs(replay):
                write(run, folder.work)
                names.append(run.name)
                done(len(names))
            with folder.locked():
                _header(folder.work, about | {"complete": True, "runs": names})
            folder.finish()
    except OSError as error:
        raise folder.unwritable(error) from error
    return names


def _header(folder: Path, content: dict[str, object]) -> None:
    (folder / HEADER).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

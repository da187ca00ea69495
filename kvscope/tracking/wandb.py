"""A replay in Weights & Biases: files of its offline mode, unless the user has chosen another."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from kvscope.core.errors import ResultError, UsageError
from kvscope.core.trackers import Tracker
from kvscope.results.store import Replay
from kvscope.tracking.environment import defaults
from kvscope.tracking.folder import Done, write_folder
from kvscope.tracking.runs import TrackedRun, missing

MEMBERS = r"wandb/.+"  # wandb chooses the names
# Nothing leaves this machine unless the user says so: neither runs nor reports of errors.
QUIET = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false"}
PROJECT = "kvscope"


def write_wandb(replay: Replay, path: Path, *, force: bool, done: Done) -> list[str]:
    """Write every run into ``path/wandb``, and return the names of the runs.

    The group of a run is the name of the replay; its id is the same at every export. With ``WANDB_MODE=online`` the
    runs are uploaded too. The project is ``WANDB_PROJECT``, or ``kvscope``.

    Raises
    ------
    ResultError
        If the package wandb is not installed or reports an error; as `write_folder`.
    UsageError
        If ``WANDB_MODE`` is ``disabled``: then nothing would be written.
    OutputExists
        As `write_folder`.
    """
    if os.environ.get("WANDB_MODE") == "disabled":
        raise UsageError("WANDB_MODE=disabled lets wandb write nothing", "Unset it, or set it to offline or online.")
    with defaults(QUIET):
        try:
            import wandb
        except ImportError as error:
            raise missing(Tracker.wandb, error) from error
        try:
            return write_folder(replay, path, Tracker.wandb, MEMBERS, _write, force=force, done=done)
        except wandb.errors.Error as error:
            raise ResultError(f"wandb: {str(error).partition(chr(10))[0]}", "See https://docs.wandb.ai.") from error
        finally:
            wandb.teardown()  # it has a process of its own


def _write(run: TrackedRun, folder: Path) -> None:
    import wandb

    settings = wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True)
    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        dir=str(folder),
        id=run.id,
        name=run.name,
        group=run.group,
        job_type="replay",
        config={**run.config, "params": dict(run.params)},
        settings=settings,
    ) as made:
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        for name, curve in run.curves.items():
            for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True):
                rows[step][name] = value
        for step in sorted(rows):
            made.log(rows[step], step=step)
        made.summary.update(dict(run.metrics))

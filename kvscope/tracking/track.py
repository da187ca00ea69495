"""The export of a replay to an experiment tracker."""

from __future__ import annotations

from pathlib import Path

from kvscope.core.options import choice
from kvscope.core.trackers import Tracker
from kvscope.results.store import Replay
from kvscope.tracking.folder import Done
from kvscope.tracking.mlflow import write_mlflow
from kvscope.tracking.tensorboard import write_tensorboard
from kvscope.tracking.wandb import write_wandb


def track(
    replay: Replay, to: str, output: str | Path, *, force: bool = False, progress: Done | None = None
) -> list[str]:
    """Write a replay for an experiment tracker, one run for each policy and budget, and return the names of the runs.

    A run contains the policy, its parameters, budget, model and trace; every metric of the summary with its interval;
    and every metric over the steps, as ``by_step/NAME``. Its group or experiment is the name of the replay.

    Parameters
    ----------
    replay : Replay
        The replay to export.
    to : {"wandb", "mlflow", "tensorboard"}
        The tracker; its package is an extra of kvscope.
    output : str or Path
        Folder to write. For MLflow a Path is an SQLite file, and a str is the address of a store: ``http://...``.
    force : bool
        Whether to replace an earlier export of this replay.
    progress : callable, optional
        Called with the number of runs written so far.

    Raises
    ------
    UsageError
        If the tracker is unknown.
    OutputExists
        If the folder exists and `force` is False.
    ResultError
        If the package is not installed, the output cannot be written, or MLflow has the runs already.
    """
    tracker, done = choice(Tracker, to, "to"), progress or _ignore
    if tracker is Tracker.mlflow:
        return write_mlflow(replay, output, force=force, done=done)
    write = write_wandb if tracker is Tracker.wandb else write_tensorboard
    return write(replay, Path(output), force=force, done=done)


def _ignore(done: int) -> None:
    """Do nothing: no progress is shown."""

"""A replay as event files of TensorBoard."""

from __future__ import annotations

from pathlib import Path

from kvscope.core.trackers import Tracker
from kvscope.results.store import Replay
from kvscope.tracking.folder import Done, write_folder
from kvscope.tracking.runs import TrackedRun, missing

MEMBERS = r"\d+-[^/]+/events\.out\.tfevents\.[^/]+"


def write_tensorboard(replay: Replay, path: Path, *, force: bool, done: Done) -> list[str]:
    """Write a folder of event files for each run into `path`, and return the names of the runs.

    How a run was made, and its metrics, are hyperparameters and scalars; TensorBoard stores them in float32.

    Raises
    ------
    ResultError
        If the package tensorboard is not installed; as `write_folder`.
    OutputExists
        As `write_folder`.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise missing(Tracker.tensorboard, error) from error

    def write(run: TrackedRun, folder: Path) -> None:
        config = {**run.config, **{f"params.{name}": value for name, value in run.params.items()}}
        with SummaryWriter(log_dir=str(folder / run.folder)) as writer:
            writer.add_hparams(config, dict(run.metrics), run_name=".")  # in the folder of the run itself
            for name, curve in run.curves.items():
                for step, value in zip(curve.steps.tolist(), curve.values.tolist(), strict=True):
                    writer.add_scalar(name, value, step)

    return write_folder(replay, path, Tracker.tensorboard, MEMBERS, write, force=force, done=done)

"""The part of ``kvscope export`` that writes to experiment trackers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvscope.core.trackers import Tracker

if TYPE_CHECKING:
    from kvscope.results.store import Replay

ToTracker = Annotated[
    Tracker | None,
    typer.Option(
        "--to",
        metavar="TRACKER",
        help="Write a run for each policy and budget instead of tables, for wandb (offline unless WANDB_MODE is set), "
        "mlflow (MLFLOW_TRACKING_URI, or an SQLite file) or tensorboard.",
        show_default=False,
    ),
]


def export_to(replay: Replay, to: Tracker, output: str | None, *, force: bool, json: bool, quiet: bool) -> None:
    """Write a replay for an experiment tracker, and print where, and how to see it."""
    from kvscope.cli import console
    from kvscope.sharing.remote import shown
    from kvscope.tracking.track import track

    place = _place(replay, to, output, force=force)
    with console.bar(f"exporting {replay.path}", len(replay.info.runs), "runs", quiet=quiet) as update:
        runs = track(replay, to, place, force=force, progress=update)
    where = shown(place) if isinstance(place, str) else str(place)
    if json:
        console.show_json({"export": where, "to": to, "replay": str(replay.path), "runs": runs})
        return
    console.show_text(where)
    console.note(f"{len(runs)} runs. {_next(to, where)}", quiet=quiet)


def _place(replay: Replay, to: Tracker, output: str | None, *, force: bool) -> Path | str:
    """Return the folder to write; for MLflow the address of the user's store, or a file, which others may share.

    Without -o it is always the same: a second export of a replay replaces the first, or is refused.
    """
    from kvscope.cli import places

    always = "mlflow.db" if to is Tracker.mlflow else places.readable(f"{replay.name}-{to}")
    given = always if output is None else output
    if to is not Tracker.mlflow:
        return places.place(places.REPORTS, given, "", force=force)
    store = os.environ.get("MLFLOW_TRACKING_URI")
    if output is None and store:
        return store
    return places.place(places.REPORTS, given, "", force=True, suffix=".db")


def _next(to: Tracker, where: str) -> str:
    """Return the command that shows what was written; none where wandb has uploaded it."""
    import shlex

    if to is Tracker.tensorboard:
        return f"Next: tensorboard --logdir {shlex.quote(where)}"
    if to is Tracker.mlflow:
        return f"Next: mlflow ui --backend-store-uri {shlex.quote(where if ':' in where else f'sqlite:///{where}')}"
    offline = os.environ.get("WANDB_MODE", "offline") == "offline"
    return f"Next: wandb sync {shlex.quote(where)}/wandb/offline-run-*" if offline else ""

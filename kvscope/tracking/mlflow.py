"""A replay in MLflow: in a file of SQLite, or wherever the user's store is."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from kvscope.core.errors import ResultError, UsageError
from kvscope.core.printable import encodable
from kvscope.core.trackers import Tracker
from kvscope.results.store import Replay
from kvscope.tracking.environment import defaults
from kvscope.tracking.folder import Done
from kvscope.tracking.runs import TrackedRun, missing, replay_id, run_id, tracked_runs

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run
    from mlflow.tracking import MlflowClient

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true"}  # nothing leaves this machine unless the user's store is elsewhere
OF_RUN, OF_REPLAY = "kvscope.run", "kvscope.replay"  # tags
MOST_METRICS, MOST_PARAMS, LONGEST = 1000, 100, 6000  # that MLflow takes in one call, and characters of a parameter
PAGE = 1000


def write_mlflow(replay: Replay, store: str | Path, *, force: bool, done: Done) -> list[str]:
    """Write every run into the experiment with the name of the replay, and return the names of the runs written.

    A run is known by a tag. What an interrupted export has not finished is written again and deleted; with `force` all
    runs of this replay are. Runs of another replay of the same name are left as they are.

    Parameters
    ----------
    replay : Replay
        What to export.
    store : str or Path
        Address of a store, or path of a file of SQLite, which is made if it is not there.
    force : bool
        Whether runs of an earlier export are deleted and written again.
    done : callable
        Called with the number of runs that are written.

    Raises
    ------
    ResultError
        If a package is not installed, the store has every run already and `force` is off, or MLflow reports an error.
    UsageError
        If the path of the file cannot be part of an address.
    """
    with defaults(QUIET):
        try:
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient

            sqlalchemy, _ = import_module("sqlalchemy"), import_module("alembic")  # MLflow needs both for SQLite
        except ImportError as error:
            raise missing(Tracker.mlflow, error) from error
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it reports every table that it makes
        try:
            client = MlflowClient(tracking_uri=address(store))
            return _write_all(client, replay, store, force=force, done=done)
        except (MlflowException, sqlalchemy.exc.SQLAlchemyError) as error:
            what = str(error).partition("\n")[0]
            raise ResultError(f"mlflow: {what}", "See https://mlflow.org/docs/latest/ml/tracking.") from error


def address(store: str | Path) -> str:
    """Return the address of a store; a path is that of a file of SQLite, whose folder is made."""
    if isinstance(store, str):
        return store
    path = store.resolve()
    if set("?#%") & set(str(path)):
        raise UsageError(
            f"{path} has a character that an SQLite address cannot have", "Name a file without ?, # and %."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultError(f"cannot make {path.parent}: {error.strerror}", "Name another file with -o.") from error
    return f"sqlite:///{path}"


def _write_all(client: MlflowClient, replay: Replay, store: str | Path, *, force: bool, done: Done) -> list[str]:
    experiment = _experiment(client, replay, store)
    there = list(_of_replay(client, experiment, replay))
    finished = set() if force else {run.data.tags[OF_RUN] for run in there if run.info.status == "FINISHED"}
    if {run_id(replay, run.run) for run in replay.info.runs} <= finished:
        raise ResultError(
            f"the experiment {replay.name} of MLflow has all {len(finished)} runs of this replay already",
            "Write them again with --force, or elsewhere with -o.",
        )
    names: list[str] = []
    for run in tracked_runs(replay, without=finished):
        _write(client, experiment, replay, run)
        for old in there:  # deleted last: an interruption leaves one of the two
            if old.data.tags[OF_RUN] == run.id:
                client.delete_run(old.info.run_id)
        names.append(run.name)
        done(len(names))
    return names


def _experiment(client: MlflowClient, replay: Replay, store: str | Path) -> str:
    """Return the id of the experiment with the name of the replay."""
    name = encodable(replay.name)
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage != "active":
        raise ResultError(
            f"the experiment {replay.name} of MLflow is deleted",
            f"Restore it: mlflow experiments restore --experiment-id {found.experiment_id}",
        )
    if found is not None:
        return str(found.experiment_id)
    beside = store.resolve().with_suffix(".artifacts").as_uri() if isinstance(store, Path) else None
    return str(client.create_experiment(name, artifact_location=beside))


def _of_replay(client: MlflowClient, experiment: str, replay: Replay) -> Iterator[Run]:
    """Yield the runs of an experiment that are of this replay."""
    token: str | None = None
    while True:
        wanted = f"tags.`{OF_REPLAY}` = '{replay_id(replay)}'"
        page = client.search_runs([experiment], wanted, max_results=PAGE, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _write(client: MlflowClient, experiment: str, replay: Replay, run: TrackedRun) -> None:
    from mlflow.entities import Param

    tags = {OF_RUN: run.id, OF_REPLAY: replay_id(replay), "mlflow.source.name": "kvscope export"}
    made = client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
    settings = {**run.config, **{f"params.{name}": value for name, value in run.params.items()}}
    params = [Param(name, str(value)[:LONGEST]) for name, value in settings.items()]
    for start in range(0, len(params), MOST_PARAMS):
        client.log_batch(made, params=params[start : start + MOST_PARAMS])
    metrics = list(_metrics(run, int(time.time() * 1000)))
    for start in range(0, len(metrics), MOST_METRICS):
        client.log_batch(made, metrics=metrics[start : start + MOST_METRICS])
    client.set_terminated(made)


def _metrics(run: TrackedRun, now: int) -> Iterable[Metric]:
    from mlflow.entities import Metric

    yield from (Metric(name, value, now, 0) for name, value in run.metrics.items())
    for name, curve in run.curves.items():
        points = zip(curve.steps.tolist(), curve.values.tolist(), strict=True)
        yield from (Metric(name, value, now, step) for step, value in points)

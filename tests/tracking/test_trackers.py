"""Real exports to each tracker, offline, read back with the tracker's own library.

They need the extras wandb, mlflow and tensorboard, which no other test does: ``make test-trackers`` installs them.
"""

import json
import os
from pathlib import Path

import pytest

from kvscope.core.errors import OutputExists, ResultError
from kvscope.results.store import Replay
from kvscope.tracking.mlflow import OF_RUN
from kvscope.tracking.runs import TrackedRun, tracked_runs
from kvscope.tracking.track import track
from tests.cli.conftest import PROMPT, Run, maps, npz, run, small
from tests.results.make import make
from tests.tracking import wandb_file

__all__ = ["npz", "run", "small"]  # fixtures

LENGTHS = [40, 30]
WHY = "{0} is not installed: make test-trackers installs and runs these tests"
pytestmark = pytest.mark.filterwarnings("default")  # those of the trackers are not ours


@pytest.fixture(autouse=True)
def no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment in which the user has set nothing."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


@pytest.fixture
def replay(tmp_path: Path) -> Replay:
    return make(tmp_path / "everything", LENGTHS)


def points(made: TrackedRun) -> dict[str, dict[int, float]]:
    return {
        name: dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True)) for name, curve in made.curves.items()
    }


def wandb_runs(folder: Path) -> list[wandb_file.OfflineRun]:
    found = [wandb_file.read(file) for file in folder.glob("wandb/offline-run-*/run-*.wandb")]
    return sorted(found, key=lambda one: one.config["run"])


def test_wandb(tmp_path: Path, replay: Replay) -> None:
    pytest.importorskip("wandb", reason=WHY.format("wandb"))
    assert track(replay, "wandb", tmp_path / "out") == ["h2o 50% open", "tova 50% open"]
    found, expected = wandb_runs(tmp_path / "out"), list(tracked_runs(replay))
    assert len(found) == 2
    for one, made in zip(found, expected, strict=True):
        assert (one.id, one.name, one.group, one.project) == (made.id, made.name, "everything", "kvscope")
        assert one.exit_code == 0
        config = {name: value for name, value in one.config.items() if name != "_wandb"}
        assert config == {**made.config, "params": made.params}
        assert {name: one.summary[name] for name in made.metrics} == made.metrics
        history: dict[str, dict[int, float]] = {}
        for row in one.history:
            for name in row.keys() & made.curves.keys():
                history.setdefault(name, {})[row["_step"]] = row[name]
        assert history == points(made)
    assert "WANDB_MODE" not in os.environ, "the mode holds for the export only"
    header = json.loads((tmp_path / "out" / "export.json").read_text())
    assert header["complete"] and header["runs"] == [made.name for made in expected]


def test_wandb_again(tmp_path: Path, replay: Replay) -> None:
    pytest.importorskip("wandb", reason=WHY.format("wandb"))
    track(replay, "wandb", tmp_path / "out")
    with pytest.raises(OutputExists):
        track(replay, "wandb", tmp_path / "out")
    before = [run.id for run in wandb_runs(tmp_path / "out")]
    track(replay, "wandb", tmp_path / "out", force=True)
    assert [run.id for run in wandb_runs(tmp_path / "out")] == before, "not one more, and under the same ids"


def test_wandb_has_the_project_of_the_user(tmp_path: Path, replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason=WHY.format("wandb"))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    track(replay, "wandb", tmp_path / "out")
    assert {run.project for run in wandb_runs(tmp_path / "out")} == {"mine"}


def test_what_stops_wandb_leaves_nothing(tmp_path: Path, replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason=WHY.format("wandb"))
    monkeypatch.setenv("WANDB_PROJECT", "a/b")  # a name that wandb refuses
    with pytest.raises(ResultError, match="wandb: ") as refused:
        track(replay, "wandb", tmp_path / "out")
    assert "\n" not in refused.value.what
    assert not list(tmp_path.glob("out*"))


def test_mlflow(tmp_path: Path, replay: Replay) -> None:
    pytest.importorskip("mlflow", reason=WHY.format("mlflow"))
    from mlflow.tracking import MlflowClient

    store = tmp_path / "deep" / "mlflow.db"
    assert track(replay, "mlflow", store) == ["h2o 50% open", "tova 50% open"]
    client = MlflowClient(tracking_uri=f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("everything")
    assert experiment.artifact_location == (tmp_path / "deep" / "mlflow.artifacts").as_uri()
    found = {run.data.tags[OF_RUN]: run for run in client.search_runs([experiment.experiment_id])}
    expected = {made.id: made for made in tracked_runs(replay)}
    assert set(found) == set(expected)
    for known_as, made in expected.items():
        data, about = found[known_as].data, found[known_as].info
        assert (about.run_name, about.status) == (made.name, "FINISHED")
        settings = {**made.config, **{f"params.{name}": value for name, value in made.params.items()}}
        assert data.params == {name: str(value) for name, value in settings.items()}
        assert {name: data.metrics[name] for name in made.metrics} == made.metrics
        for name, curve in points(made).items():
            history = client.get_metric_history(about.run_id, name)
            assert {point.step: point.value for point in history} == curve and len(history) == len(curve)


def test_mlflow_again(tmp_path: Path, replay: Replay) -> None:
    pytest.importorskip("mlflow", reason=WHY.format("mlflow"))
    from mlflow.tracking import MlflowClient

    store = tmp_path / "mlflow.db"
    track(replay, "mlflow", store)
    with pytest.raises(ResultError, match="has all 2 runs of this replay already") as refused:
        track(replay, "mlflow", store)
    assert "--force" in refused.value.todo
    client = MlflowClient(tracking_uri=f"sqlite:///{store}")
    number = client.get_experiment_by_name("everything").experiment_id
    first = {run.data.tags[OF_RUN]: run.info.run_id for run in client.search_runs([number])}

    track(replay, "mlflow", store, force=True)
    second = {run.data.tags[OF_RUN]: run.info.run_id for run in client.search_runs([number])}
    assert set(second) == set(first) and not set(second.values()) & set(first.values()), "replaced, and not doubled"

    stopped, whole = second
    client.update_run(second[stopped], status="RUNNING")  # as a killed export leaves it
    assert len(track(replay, "mlflow", store)) == 1
    third = {run.data.tags[OF_RUN]: run.info.run_id for run in client.search_runs([number])}
    assert set(third) == set(second) and third[whole] == second[whole] and third[stopped] != second[stopped]

    other = make(tmp_path / "x" / "everything", LENGTHS, shift=0.1)
    track(other, "mlflow", store)
    assert len(client.search_runs([number])) == 4, "another replay of the same name is beside it"
    track(other, "mlflow", store, force=True)
    assert len(client.search_runs([number])) == 4

    client.delete_experiment(number)
    with pytest.raises(ResultError, match="is deleted") as refused:
        track(replay, "mlflow", store)
    assert f"--experiment-id {number}" in refused.value.todo


def test_mlflow_that_cannot_be_used(tmp_path: Path, replay: Replay) -> None:
    pytest.importorskip("mlflow", reason=WHY.format("mlflow"))
    (tmp_path / "text.db").write_text("this is no database\n" * 100)
    with pytest.raises(ResultError, match="mlflow: ") as refused:
        track(replay, "mlflow", tmp_path / "text.db")
    assert "\n" not in refused.value.what
    with pytest.raises(ResultError, match="mlflow: "):
        track(replay, "mlflow", "unheard-of://store")


def test_tensorboard(tmp_path: Path, replay: Replay) -> None:
    pytest.importorskip("tensorboard", reason=WHY.format("tensorboard"))
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams import plugin_data_pb2

    assert track(replay, "tensorboard", tmp_path / "out") == ["h2o 50% open", "tova 50% open"]
    board = EventMultiplexer(size_guidance=None, tensor_size_guidance={"scalars": 0})
    board.AddRunsFromDirectory(str(tmp_path / "out"))
    board.Reload()
    expected = {made.folder: made for made in tracked_runs(replay)}
    assert set(board.Runs()) == set(expected) == {"000-h2o-50%-open", "001-tova-50%-open"}
    for folder, made in expected.items():
        accumulator = board.GetAccumulator(folder)
        for name, value in made.metrics.items():
            (point,) = accumulator.Tensors(name)
            assert point.step == 0
            assert point.tensor_proto.float_val[0] == pytest.approx(value, rel=1e-6), "float32"
        for name, curve in points(made).items():
            found = {point.step: point.tensor_proto.float_val[0] for point in accumulator.Tensors(name)}
            assert found == pytest.approx(curve, rel=1e-6)
        content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        told = {name: getattr(value, str(value.WhichOneof("kind"))) for name, value in settings.items()}
        assert told == {**made.config, **{f"params.{name}": value for name, value in made.params.items()}}


def test_tensorboard_again(tmp_path: Path, replay: Replay) -> None:
    pytest.importorskip("tensorboard", reason=WHY.format("tensorboard"))
    track(replay, "tensorboard", tmp_path / "out")
    files = len(list((tmp_path / "out").rglob("events.*")))
    with pytest.raises(OutputExists):
        track(replay, "tensorboard", tmp_path / "out")
    track(replay, "tensorboard", tmp_path / "out", force=True)
    assert len(list((tmp_path / "out").rglob("events.*"))) == files
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(ResultError, match=r"thesis\.txt"):
        track(replay, "tensorboard", tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.txt").exists()


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "mlflow"])
def test_the_command(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch, tracker: str) -> None:
    pytest.importorskip(tracker, reason=WHY.format(tracker))
    assert small.exists() and maps().shape[2] > PROMPT
    chosen = ("--policy", "h2o", "--policy", "a2sf:alpha=0.7", "--policy", "full")
    assert run("replay", *chosen, "--budget", "25%,50%", "-o", "mine", "-q").status == 0
    done = run("export", "mine", "--to", tracker, "--json")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    place = "reports/mlflow.db" if tracker == "mlflow" else f"reports/mine-{tracker}"
    assert (told["export"], told["to"]) == (place, tracker)
    policies, budgets = ("h2o", "a2sf(alpha=0.7)"), ("25%", "50%")
    names = [f"{policy} {budget} open" for policy in policies for budget in budgets]
    assert sorted(told["runs"]) == sorted([*names, "full no budget open"])
    again = run("export", "mine", "--to", tracker)
    assert again.status == 1 and "--force" in again.two_lines()[1]
    done = run("export", "mine", "--to", tracker, "--force")
    assert done.status == 0, done.err
    assert done.out.strip() == place
    assert {"wandb": "wandb sync", "mlflow": "mlflow ui", "tensorboard": "tensorboard --logdir"}[tracker] in done.err
    if tracker == "mlflow":
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{Path.cwd()}/shared.db")
        done = run("export", "mine", "--to", tracker)
        assert done.status == 0 and Path("shared.db").is_file(), done.err
        assert run("export", "mine", "--to", tracker, "-o", "own").status == 0 and Path("reports/own.db").is_file()


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "mlflow"])
def test_a_name_that_is_not_utf8(tmp_path: Path, tracker: str) -> None:
    pytest.importorskip(tracker, reason=WHY.format(tracker))
    odd = make(tmp_path / 'a\udcff "b" %s', LENGTHS)
    assert {made.group for made in tracked_runs(odd)} == {'a\\udcff "b" %s'}
    assert len(track(odd, tracker, tmp_path / "out.db" if tracker == "mlflow" else tmp_path / "out")) == 2

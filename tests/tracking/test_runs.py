"""What a tracker is given of a replay, without any tracker: names, settings, figures, curves, refusals."""

import math
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from kvscope.core.errors import ResultError, UsageError
from kvscope.results.curves import curves
from kvscope.results.store import open_replay
from kvscope.tracking.environment import defaults
from kvscope.tracking.mlflow import address
from kvscope.tracking.runs import run_id, tracked_runs
from kvscope.tracking.track import track
from tests.results.make import METRICS, make, values

ROOT = Path(__file__).parent.parent.parent
LENGTHS = [9, 6]


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def by_step(run: int, metric: str) -> dict[int, float]:
    """Return the curve of a replay of `make` by plain loops: heads and layers, then sequences."""
    of_step: dict[int, list[float]] = defaultdict(list)
    for sequence, length in enumerate(LENGTHS):
        drawn = [values(100 * run + 10 * sequence + layer, length)[metric] for layer in (0, 1)]
        for step in range(length):
            there = [float(head[step]) for layer in drawn for head in layer if not math.isnan(head[step])]
            if there:
                of_step[step].append(mean(there))
    return {step: mean(found) for step, found in of_step.items()}


@pytest.mark.parametrize("group", [1, 2**20])
def test_curves_equal_plain_loops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int) -> None:
    monkeypatch.setattr("kvscope.results.writer.GROUP_ROWS", group)
    replay = make(tmp_path / "r", LENGTHS)
    for run in (0, 1):
        found = curves(replay, run)
        assert set(found) == set(METRICS)
        for name, curve in found.items():
            expected = by_step(run, name)
            assert curve.steps.tolist() == sorted(expected) == list(range(2, 9)), "the first two steps have no value"
            assert curve.values == pytest.approx([expected[step] for step in sorted(expected)], abs=1e-12)


def test_long_curves_are_means_of_neighbours(tmp_path: Path) -> None:
    replay = make(tmp_path / "r", LENGTHS)
    whole, thin = curves(replay, 0)["retained_mass"], curves(replay, 0, most=3)["retained_mass"]
    assert len(whole.steps) == 7
    assert thin.steps.tolist() == [4, 7, 8], "three of seven, three, and the rest"
    assert thin.values == pytest.approx([whole.values[:3].mean(), whole.values[3:6].mean(), whole.values[6]])
    assert len(curves(replay, 0, most=7)["retained_mass"].steps) == 7


def test_a_closed_run_has_the_losses_of_its_tokens() -> None:
    replay = open_replay(ROOT / "reports" / "example")
    closed = next(run.run for run in replay.info.runs if run.loop == "closed")
    found, tokens = curves(replay, closed), replay.tokens(closed)
    assert found["kl"].steps.tolist() == sorted(tokens["position"])
    assert found["kl"].values == pytest.approx(tokens.sort_values("position")["kl"].to_numpy())
    assert "kl" not in curves(replay, 0), "an open run has none"


def test_a_run_has_what_its_row_in_the_table_has() -> None:
    replay = open_replay(ROOT / "reports" / "example")
    shown = [run for run in replay.summary.runs if run.run % 20 == 3]
    others = [run_id(replay, run.run) for run in replay.summary.runs if run not in shown]
    assert {run.loop for run in shown} == {"open", "closed"}
    for run, made in zip(shown, tracked_runs(replay, without=others), strict=True):
        assert (made.name, made.group) == (run.title, "example")
        assert made.config["model"] == "demo" and made.config["trace"] == "example"
        assert made.config["kvscope"] == replay.info.versions["kvscope"]
        assert (made.config["policy"], made.config["budget"], made.config["prefill"]) == (
            run.policy,
            run.budget,
            "full",
        )
        assert made.params == {name: value for name, value in run.params.items() if value is not None}
        for name, value in run.metrics.items():
            for part, figure in (("", value.mean), ("_low", value.low), ("_high", value.high), ("_count", value.count)):
                assert made.metrics.get(name + part) == figure
        assert set(made.metrics) <= {
            f"{name}{part}" for name in run.metrics for part in ("", "_low", "_high", "_count")
        }
        assert all(name.startswith("by_step/") for name in made.curves), "a curve does not replace the mean"


def test_the_same_run_has_the_same_id(tmp_path: Path) -> None:
    replay, again, other = (
        make(tmp_path / "r", LENGTHS),
        make(tmp_path / "x" / "r", LENGTHS),
        make(tmp_path / "s", LENGTHS),
    )
    changed = make(tmp_path / "y" / "r", LENGTHS, shift=0.1)
    ids = [[run_id(one, run) for run in (0, 1)] for one in (replay, again, other, changed)]
    assert ids[0] == ids[1], "made again with the same figures"
    assert len({known_as for pair in ids for known_as in pair}) == 6, "another run, name or figures"
    assert [run.id for run in tracked_runs(replay)] == ids[0]
    assert [run.id for run in tracked_runs(replay, without=ids[0][:1])] == ids[0][1:]


def test_folders_differ_even_where_names_do_not() -> None:
    replay = open_replay(ROOT / "reports" / "example")
    folders = [run.folder for run in tracked_runs(replay, without=[run_id(replay, run) for run in range(5, 100)])]
    assert folders[0] == "000-a2sf-20%-open" and len(set(folders)) == 5
    assert not any(set('/\\:*?"<>|') & set(folder) for folder in folders)


@pytest.mark.parametrize(
    ("tracker", "modules"),
    [
        ("wandb", ["wandb"]),
        ("mlflow", ["mlflow", "mlflow.exceptions", "mlflow.tracking"]),
        ("mlflow", ["sqlalchemy"]),
        ("tensorboard", ["torch.utils.tensorboard", "tensorboard"]),
    ],
)
def test_a_package_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracker: str, modules: list[str]
) -> None:
    if tracker == "mlflow" and modules == ["sqlalchemy"]:
        pytest.importorskip("mlflow", reason="mlflow is not installed: make test-trackers")
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ResultError) as refused:
        track(make(tmp_path / "r", LENGTHS), tracker, tmp_path / "out")
    assert "which is not installed" in refused.value.what and tracker in refused.value.what
    assert f'pip install "kvscope[{tracker}]"' in refused.value.todo
    assert not (tmp_path / "out").exists()


def test_an_unknown_tracker_and_a_mode_that_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = make(tmp_path / "r", LENGTHS)
    with pytest.raises(UsageError, match="'comet'"):
        track(replay, "comet", tmp_path / "out")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(UsageError, match="WANDB_MODE=disabled"):
        track(replay, "wandb", tmp_path / "out")


def test_addresses_of_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert address("http://localhost:5000") == "http://localhost:5000"
    monkeypatch.chdir(tmp_path)
    assert address(Path("deep/a b.db")) == f"sqlite:///{tmp_path.resolve()}/deep/a b.db"
    assert Path("deep").is_dir()
    with pytest.raises(UsageError, match=r"50%\.db"):
        address(Path("50%.db"))
    Path("file").write_text("")
    with pytest.raises(ResultError, match="cannot make"):
        address(Path("file/in.db"))


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVSCOPE_SET", "mine")
    monkeypatch.delenv("KVSCOPE_UNSET", raising=False)
    with defaults({"KVSCOPE_SET": "other", "KVSCOPE_UNSET": "default"}):
        assert (os.environ["KVSCOPE_SET"], os.environ["KVSCOPE_UNSET"]) == ("mine", "default")
    assert os.environ["KVSCOPE_SET"] == "mine" and "KVSCOPE_UNSET" not in os.environ


def test_nothing_is_lost_between_float32_and_the_curve(tmp_path: Path) -> None:
    """Values are stored in float32 and averaged in float64."""
    found = curves(make(tmp_path / "r", [5]), 0)["output_error"]
    drawn = np.stack([values(layer, 5)["output_error"] for layer in (0, 1)]).astype(np.float64)  # [L, H, T]
    assert found.values.tolist() == pytest.approx(drawn.mean((0, 1))[2:].tolist(), rel=1e-15)

"""``kvscope report`` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvscope.cli.app import run
from kvscope.core.seal import sealed
from kvscope.results.store import Replay


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_page_and_data_have_their_places(here: Path, replay: Replay, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(replay.path), "-q"]) == 0
    assert run(["report", str(replay.path), "--data-only", "-q"]) == 0
    assert capsys.readouterr().out.split() == ["reports/small.html", "reports/small.json"]
    data = json.loads(Path("reports/small.json").read_text())
    assert {panel["name"] for panel in data["panels"]} >= {"overview", "residency", "text"}
    assert Path("reports/small.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_existing_data_stay_unless_forced(here: Path, replay: Replay, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.json").write_text("mine")
    assert run(["report", str(replay.path), "--data-only", "-o", "./mine.json", "-q"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert Path("mine.json").read_text() == "mine"
    assert run(["report", str(replay.path), "--data-only", "-o", "./mine.json", "--force", "-q"]) == 0
    assert json.loads(Path("mine.json").read_text())["title"] == "KV-cache eviction: small"


def test_a_replay_of_plain_text_needs_no_trace(
    here: Path, replay: Replay, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    copy = tmp_path / "text"
    shutil.copytree(replay.path, copy)
    info = json.loads((copy / "run.json").read_text())
    info["trace"] = {name: value for name, value in info["trace"].items() if name != "path"} | {"kind": "text"}
    (copy / "run.json").write_text(json.dumps(sealed(info)))
    assert run(["report", str(copy), "-q"]) == 0
    assert "lacks" not in capsys.readouterr().err

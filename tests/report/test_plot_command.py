"""``kvscope plot`` as a user types it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvscope.cli.app import run
from kvscope.report.source import ReportInput
from kvscope.results.store import Replay

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'kvscope[plot]'")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_figure_has_its_place_and_size(here: Path, replay: Replay, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plot", str(replay.path), "-q"]) == 0
    size = ["--style", "paper", "--width", "3", "--height", "2", "--font-size", "7", "-q"]
    assert run(["plot", str(replay.path), "--panel", "budget_curve", *size, "-o", "fig.svg"]) == 0
    assert capsys.readouterr().out.split() == ["reports/small-budget-curve.pdf", "fig.svg"]
    assert Path("reports/small-budget-curve.pdf").read_bytes().startswith(b"%PDF-")
    svg = Path("fig.svg").read_text(encoding="utf-8")
    assert 'width="216pt" height="144pt"' in svg
    assert run(["plot", str(replay.path), "-q", "-o", "fig.svg"]) == 1
    assert "exists already" in capsys.readouterr().err
    assert Path("fig.svg").read_text(encoding="utf-8") == svg


def test_runs_layers_and_heads_are_chosen_by_options(here: Path, rich: ReportInput) -> None:
    """The same options of the same replay give the same bytes; others give a different figure."""
    path = str(rich.replays[0].path)
    made = []
    for options in (
        ["-p", "h2o", "-b", "4"],
        ["-p", "h2o", "-b", "8"],
        ["-p", "tova", "-b", "4", "--layer", "1"],
        ["-p", "tova", "-b", "4", "--layer", "1", "--head", "2"],
    ):
        assert run(["plot", path, "--panel", "head-map", *options, "-q", "-o", "map.svg", "--force"]) == 0
        assert run(["plot", path, "--panel", "residency", *options, "-q", "-o", "residency.svg", "--force"]) == 0
        made.append((Path("map.svg").read_bytes(), Path("residency.svg").read_bytes()))
    assert made[0][0] != made[1][0] and made[0][1] != made[1][1]
    assert made[2][1] != made[3][1] and made[2][0] == made[3][0]


def test_policies_choose_the_lines(here: Path, rich: ReportInput) -> None:
    path = str(rich.replays[0].path)
    assert run(["plot", path, "-p", "h2o", "-p", "tova", "--against", "share", "-q", "-o", "lines.svg"]) == 0
    assert sorted(re.findall(r"<!-- (h2o|tova|window|snapkv) -->", Path("lines.svg").read_text())) == ["h2o", "tova"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--panel", "budget_curv"], "Did you mean budget_curve"),
        (["--style", "papers"], "Did you mean paper"),
        (["-o", "fig.eps"], ".pdf, .svg, .png"),
        (["--against", "key"], "no axis is called 'key'"),
        (["--width", "0"], "a width of 0 cannot be drawn"),
    ],
)
def test_mistakes_are_explained(
    here: Path, replay: Replay, options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plot", str(replay.path), "-q", *options]) == 2
    said = capsys.readouterr().err
    assert says in said and "Traceback" not in said
    assert not list(here.iterdir())

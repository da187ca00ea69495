"""Figures in files: their size, their format, what is in them, and errors that state what can be drawn."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import kvscope
from kvscope.core.errors import OutputExists, UsageError
from kvscope.report.paper import STYLES, drawn, save, style
from kvscope.report.source import ReportInput
from kvscope.results.store import Replay

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'kvscope[plot]'")

PANELS = ("budget_curve", "over_time", "head_map", "residency", "agreement", "outcome", "answers", "sweep", "queries")


@pytest.mark.parametrize("name", [*PANELS, "norms", "inspector", "spans"])
def test_every_figure_is_drawn(rich: ReportInput, name: str) -> None:
    figure = kvscope.plot(rich.replays, name, traces=rich.traces, step=20)
    assert drawn(figure, "svg", style("paper")).startswith(b"<?xml")


@pytest.mark.parametrize(("form", "start"), [("pdf", b"%PDF-"), ("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_same_figure_gives_the_same_bytes_in_every_format(replay: Replay, form: str, start: bytes) -> None:
    content = drawn(kvscope.plot(replay, "residency"), form, style("paper"))
    assert content.startswith(start)
    assert content == drawn(kvscope.plot(replay, "residency"), form, style("paper"))


def test_size_is_in_inches_and_fonts_are_in_the_file(replay: Replay, tmp_path: Path) -> None:
    figure = kvscope.plot(replay)
    content = save(figure, tmp_path / "f.pdf", style("paper", width=4.5, height=2)).read_bytes()
    assert re.search(rb"/MediaBox \[ 0 0 324 144 \]", content), "4.5 x 2 inches in points"
    assert b"/FontFile2" in content and b"/Type3" not in content, "TrueType, as publishers require"
    svg = save(figure, tmp_path / "f.svg", style("paper", width=4.5, height=2)).read_text(encoding="utf-8")
    assert 'width="324pt" height="144pt"' in svg


def test_font_size_and_title_are_those_of_the_style(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    seen: list[tuple[float, set[float], str]] = []
    written = Figure.savefig

    def watched(self: Figure, *args: object, **options: object) -> None:
        self.draw_without_rendering()  # type: ignore[no-untyped-call]
        texts = [text for axes in self.axes for text in (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels())]
        seen.append((*self.get_size_inches(), {text.get_fontsize() for text in texts}, self.get_suptitle()))
        written(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", watched)
    drawn(kvscope.plot(replay), "svg", style("paper", font_size=7))
    drawn(kvscope.plot(replay), "svg", style("slides"))
    usual, slides = STYLES["paper"], STYLES["slides"]
    assert seen[0] == (usual.width, usual.height, {7.0}, "")
    assert seen[1] == (slides.width, slides.height, {slides.font_size}, "retained mass")


def test_lines_hidden_in_the_legend_are_not_drawn(rich: ReportInput) -> None:
    svg = drawn(kvscope.plot(rich.replays[0], policies=["h2o"]), "svg", style("paper")).decode()
    assert svg.count('id="LineCollection') <= 1 and svg.count("<!-- h2o") == 0, "one line needs no legend"
    svg = drawn(kvscope.plot(rich.replays[0], policies=["h2o", "tova"]), "svg", style("paper")).decode()
    assert "<!-- h2o -->" in svg and "<!-- tova -->" in svg and "<!-- window -->" not in svg


def test_a_label_with_dollar_signs_is_text(replay: Replay) -> None:
    figure = kvscope.plot(replay)
    figure.data[0].name = r"$\frac{1}{0$ <b>x</b>"
    assert drawn(figure, "pdf", style("paper")).startswith(b"%PDF-")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"name": "papers"}, "Did you mean paper"),
        ({"name": "paper", "width": 0.1}, "a width of 0.1 cannot be drawn"),
        ({"name": "paper", "height": 99.0}, "from 0.5 to 60"),
        ({"name": "paper", "font_size": float("nan")}, "font size of nan"),
    ],
)
def test_what_cannot_be_drawn_is_an_error(given: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        style(**given)  # type: ignore[arg-type]
    assert says in f"{caught.value.what} {caught.value.todo}"


def test_other_formats_and_existing_files_are_refused(replay: Replay, tmp_path: Path) -> None:
    figure = kvscope.plot(replay)
    with pytest.raises(UsageError, match="has no format") as caught:
        save(figure, tmp_path / "f.eps", style("paper"))
    assert ".pdf, .svg, .png" in caught.value.todo
    (tmp_path / "f.pdf").write_text("mine")
    with pytest.raises(OutputExists):
        save(figure, tmp_path / "f.pdf", style("paper"))
    assert (tmp_path / "f.pdf").read_text() == "mine"


def test_without_matplotlib_the_command_to_install_it_is_named(replay: Replay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError) as caught:
        drawn(kvscope.plot(replay), "pdf", style("paper"))
    assert "kvscope[plot]" in caught.value.todo

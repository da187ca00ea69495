"""Spans by head: the steps at which heads lose a fact, equal to a plain loop, and where the spans are from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvscope.cli.app import run
from kvscope.core.residency import ResidencyIntervals
from kvscope.report.encoding import unpacked
from kvscope.report.limits import Limits
from kvscope.report.panels.spans import lost, spans
from kvscope.report.parts import NamedSpan
from kvscope.report.source import ReportInput
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace
from tests.report.test_summary_panels import run_of


def plainly(leaves: list[list[int]], span: NamedSpan, length: int) -> list[list[int]]:
    """Return what `lost` has to: one step after another, one token after another."""
    found = [[-1] * len(leaves) for _ in range(3)]
    for head, leave in enumerate(leaves):
        for step in range(length - 1, span.stop - 2, -1):
            held = sum(key <= step < leave[key] for key in range(span.start, span.stop))
            size = span.stop - span.start
            for place, below in enumerate((held < size, held <= size / 2, held == 0)):
                if below:
                    found[place][head] = step
    return found


@pytest.mark.parametrize("seed", range(20))
def test_lost_steps_equal_the_plain_loop(seed: int) -> None:
    random = np.random.default_rng(seed)
    length, heads = 12, 3
    leave = np.minimum(np.arange(length) + random.integers(1, 12, (heads, length)), length)
    leave[random.random(leave.shape) < 0.3] = length
    start = int(random.integers(0, 8))
    span = NamedSpan("x", start, start + int(random.integers(1, 5)))
    found = lost(ResidencyIntervals.from_eviction_steps(leave), span)
    assert found.tolist() == plainly(leave.tolist(), span, length)


def test_spans_of_the_prompt_and_given_ones_are_shown(rich: ReportInput) -> None:
    identity = rich.replays[0].info.trace.identity
    data = spans(replace(rich, spans={f"{identity}/0": [NamedSpan("needle", 8, 10), NamedSpan("end", 20, 22)]}))
    assert data is not None
    part = data["parts"]["0.0"]
    assert [(one["name"], one["start"], one["stop"]) for one in part["spans"]] == [
        ("needle", 2, 5),
        ("needle-2", 8, 10),
        ("end", 20, 22),
    ]
    window = unpacked(part["runs"][run_of(rich, "window", "4").id])  # holds the newest four keys after the prompt
    assert window.shape == (3, 3, 2, 2)
    assert window[0].tolist() == [[[9, 9], [9, 9]]] * 3, "the prompt of ten tokens is cut after its last"
    assert window[1].tolist() == [[[12, 12]] * 2, [[12, 12]] * 2, [[13, 13]] * 2]
    assert window[2].tolist() == [[[-1, -1]] * 2] * 3


def test_without_spans_there_is_no_panel_and_what_is_omitted_is_counted(source: ReportInput, rich: ReportInput) -> None:
    assert spans(source) is None
    data = spans(replace(rich, limits=Limits(map_bytes=200)))
    assert data is not None and "runs are omitted" in data["notes"][0]
    assert 0 < len(data["parts"]["0.0"]["runs"]) < len(rich.runs)


def test_spans_are_named_on_the_command_line(
    trace: Trace, replay: Replay, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "page.json"
    named = ["--span", "who=text:king", "-s", "ends=4:6"]
    assert run(["report", str(replay.path), "--data-only", "-o", str(path), *named, "-q"]) == 0
    assert (
        '"name":"who","start":1,"stop":2' in path.read_text() and '"name":"ends","start":4,"stop":6' in path.read_text()
    )
    for span, says in (("who=text:queen", "queen"), ("far=50:60", "60"), ("nameless", "has no name")):
        assert run(["report", str(replay.path), "--data-only", "-o", str(tmp_path / "x.json"), "-s", span, "-q"]) == 2
        assert says in capsys.readouterr().err

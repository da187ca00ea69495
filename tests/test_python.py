"""The package as it is used from Python, in a script or a notebook."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
from torch import Tensor

import kvscope
from kvscope.metrics.base import METRICS
from kvscope.policies.h2o import H2O
from kvscope.policies.vatp import VATP
from kvscope.results.frames import averaged

EXAMPLE = Path(__file__).parent.parent / "traces" / "example"


@pytest.fixture(scope="module")
def trace() -> kvscope.Trace:
    return kvscope.open(EXAMPLE)


@pytest.fixture(scope="module")
def replay(trace: kvscope.Trace) -> kvscope.Replay:
    return kvscope.replay(trace, [H2O, "tova"], [0.2, 30], metrics=["retained_mass", "full_cosine"])


def test_a_trace_and_a_replay_in_one_line(trace: kvscope.Trace, replay: kvscope.Replay) -> None:
    assert repr(trace) == f"<Trace {EXAMPLE}: demo, 1 sequence of 107 tokens, 4 layers of 8 heads (4 key/value)>"
    found = f"<Replay {replay.path}: 4 runs (2 policies, 2 budgets) over demo, 1 sequence, 4 layers>"
    assert repr(replay) == found
    assert "<td>91</td><td>16</td>" in trace._repr_html_() and "retained mass" in replay._repr_html_()


def test_text_in_the_html_of_a_notebook_is_escaped(trace: kvscope.Trace) -> None:
    from kvscope.trace.shown import html

    assert "<b>" not in html(Path("a<b>c"), trace.header, [(3, 5)])


def test_frames_name_policies_and_budgets(replay: kvscope.Replay) -> None:
    frame = replay.frame()
    assert frame[["policy", "budget", "loop"]].values.tolist() == [
        *(["h2o", "20%", "open"], ["h2o", "30", "open"]),
        *(["tova", "20%", "open"], ["tova", "30", "open"]),
    ]
    assert frame["retained_mass"].between(0, 1).all()
    rows = replay.frame("fidelity")
    assert "run" not in rows and len(rows) == len(replay.fidelity())
    assert set(replay.frame("residency")["policy"]) == {"h2o", "tova"}


def test_fidelity_is_averaged_per_head(replay: kvscope.Replay) -> None:
    heads = replay.frame("fidelity", per="head")
    assert len(heads) == 4 * 4 * 8  # runs, layers, query heads
    one = heads.query("policy == 'tova' and budget == '30' and layer == 2 and head == 5")["retained_mass"].item()
    rows = replay.fidelity(run=3, layer=2).query("head == 5")["retained_mass"]
    assert one == pytest.approx(rows.mean(), rel=1e-6)
    assert len(replay.frame("fidelity", per="run")) == 4


def test_means_of_both_loops_are_apart() -> None:
    runs = {"policy": "h2o", "budget": "20%", "loop": ["open", "closed"], "sequence": 0, "layer": 0, "head": 0}
    frame = pd.DataFrame({**runs, "step": 5, "retained_mass": [0.25, 0.75]})
    assert averaged(frame, "head")[["loop", "retained_mass"]].values.tolist() == [["open", 0.25], ["closed", 0.75]]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda replay: replay.frame("fidelty"), "no table 'fidelty'"),
        (lambda replay: replay.frame("fidelity", per="heads"), "averaged per 'heads'"),
        (lambda replay: replay.frame("tokens"), "no run of the closed loop"),
    ],
)
def test_what_a_frame_cannot_be(replay: kvscope.Replay, call: Callable[[kvscope.Replay], object], says: str) -> None:
    with pytest.raises(kvscope.UsageError, match=says):
        call(replay)


def test_without_an_output_the_folder_lives_as_long_as_the_replay(trace: kvscope.Trace) -> None:
    made = kvscope.replay(trace, "window", 0.5, metrics=["retained_mass"])
    folder = made.path.parent
    assert (made.path / "summary.json").is_file()
    del made
    gc.collect()
    assert not folder.exists()


def test_a_failed_replay_leaves_no_temporary_folder(
    trace: kvscope.Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("kvscope.replay.compile.ReplayJob.execute", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kvscope.replay(trace, "window", 0.5)
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Oldest(kvscope.Policy):
    """Retain the oldest keys."""

    def observe(self, step: kvscope.Step, score: Tensor) -> Tensor:
        return score - step.t


def test_policies_are_names_objects_and_classes(trace: kvscope.Trace) -> None:
    made = kvscope.replay(trace, [Oldest, H2O(recent=1), VATP, "h2o:recent=2"], 20, metrics=["retained_mass"])
    assert list(made.frame()["policy"]) == ["Oldest", "h2o(recent=1)", "vatp", "h2o(recent=2)"]


def test_what_is_no_policy(trace: kvscope.Trace) -> None:
    class Plain(kvscope.Policy):
        pass

    for wrong, says in ((dict, "dict is not a policy"), (Plain, "Plain is not a dataclass")):
        with pytest.raises(kvscope.UsageError, match=says):
            kvscope.replay(trace, wrong, 20)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "means"), [(0.2, "20%"), (0.125, "12.5%"), (1, "1"), (1.0, "1"), (256.0, "256"), ("20%", "20%")]
)
def test_budgets_are_numbers_or_text(given: str | float, means: str) -> None:
    assert str(kvscope.Budget.parse(given)) == means


@pytest.mark.parametrize("wrong", [1.5, 0.0, -0.2, float("nan"), float("inf"), True])
def test_what_is_no_budget(wrong: float) -> None:
    with pytest.raises(kvscope.UsageError, match="budget"):
        kvscope.Budget.parse(wrong)


def test_metrics_are_names_or_functions(trace: kvscope.Trace) -> None:
    @kvscope.metric("kept_sum", direction="higher", range=(0, 1), when_nothing_evicted=1.0)
    def kept_sum(rows: kvscope.Rows) -> Tensor:
        """Sum of the kept weights."""
        return rows.kept.mass

    try:
        frame = kvscope.replay(trace, "h2o", 0.2, metrics=[kept_sum, "retained_mass"]).frame()
        assert frame["kept_sum"].item() == pytest.approx(frame["retained_mass"].item(), abs=1e-4)
    finally:
        METRICS.remove("kept_sum")
    with pytest.raises(kvscope.UsageError, match="is not a metric"):
        kvscope.replay(trace, "h2o", 0.2, metrics=[len])  # type: ignore[list-item]


def test_the_closed_loop_in_one_call(trace: kvscope.Trace, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text((EXAMPLE.parent / "example.txt").read_text())
    made = kvscope.perplexity("demo", text, ["full", "window"], 0.2)
    by_policy = dict(zip(made.frame()["policy"], made.frame()["perplexity"], strict=True))
    assert by_policy["full"] < by_policy["window"]
    both = kvscope.perplexity("demo", text, "full", cache="16bit,int2:kivi(group=8,residual=8)").frame()
    assert both["policy"].tolist()[1].startswith("full + int2:kivi") and both["perplexity"].nunique() == 2
    (verdict,) = kvscope.verify(trace, "h2o", 20, tokens=100)
    assert verdict.agrees and verdict.tokens > 0


def test_policies_are_described() -> None:
    (row,) = kvscope.policies("tova")
    assert row["formula"] and len(kvscope.policies()) > 20

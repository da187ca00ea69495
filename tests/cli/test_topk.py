"""Traces that leave something out, through the commands: what that means is said wherever numbers are."""

import json
from pathlib import Path

import pytest

from kvscope.model.pipeline import IN_FLIGHT
from tests.cli.conftest import Run

TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: "
    "once or twice she had peeped into the book her sister was reading, but it had no pictures."
)
NEW = ("--max-new-tokens", "16", "-q")


@pytest.fixture
def record(run: Run):
    """Record a trace of the bundled model; `options` are those of ``kvscope trace``."""
    Path("prompt.txt").write_text(TEXT)

    def go(name: str, *options: str) -> None:
        done = run("trace", "--model", "demo", "prompt.txt", "-o", name, *NEW, *options)
        assert done.status == 0, done.err

    return go


def test_a_lossy_trace_is_marked_from_info_to_report(run: Run, record) -> None:
    record("some", "--store", "topk:16")
    assert {path.name for path in Path("traces/some").iterdir()} >= {"topk", "columns", "keys", "queries"}
    told = json.loads(run("info", "--json").out)
    assert (told["store"], told["top"]) == ("topk", 16)
    assert 0 < told["loss"]["mean_after_prompt"] < told["loss"]["worst"] < 1
    assert "topk:16" in run("info").out
    assert "Lossy: " in run("info").out

    done = run("replay", "some", "--policy", "a2sf", "--policy", "window", "--budget", "40%", "-o", "mine")
    assert done.status == 0, done.err
    assert "Lossy: the trace keeps the 16 heaviest keys" in " ".join(done.out.split())
    about = json.loads(Path("reports/mine/run.json").read_text())
    assert about["trace"]["lossy"]["top"] == 16
    assert about["trace"]["lossy"]["bounds"]["retained_mass"] == "r"
    assert {row["policy"]: row["lossy"] for row in about["runs"]} == {"a2sf": True, "window": False}
    summary = json.loads(Path("reports/mine/summary.json").read_text())
    assert summary["trace"]["approximate"] == about["trace"]["approximate"]
    assert "Not computed: output_error" in " ".join(done.out.split())

    assert run("report", "mine").status == 0
    assert "Lossy: the trace keeps the 16 heaviest keys" in Path("reports/mine.html").read_text()
    assert run("info", "--verify", "-q").status == 0


def test_a_lossy_trace_is_not_compared_with_a_whole_one(run: Run, record) -> None:
    for name, store in (("some", "topk:16"), ("whole", "maps")):
        record(name, "--store", store)
        assert run("replay", name, "--policy", "h2o", "-o", name, "-q").status == 0
    done = run("diff", "whole", "some")
    assert done.status == 1
    assert "different traces" in done.two_lines()[0]
    one, other = (json.loads(Path(f"reports/{name}/summary.json").read_text())["runs"][0] for name in ("some", "whole"))
    assert "lossy" not in other
    near = one["metrics"]["retained_mass"]["mean"] - other["metrics"]["retained_mass"]["mean"]
    assert abs(near) < 0.05


def test_some_heads_replay_where_each_decides_for_itself(run: Run, record) -> None:
    record("part", "--heads", "2-3")
    assert "8 query heads 2, 3 were recorded" in " ".join(run("info").out.split())
    done = run("replay", "part", "--policy", "h2o", "--policy", "window", "-o", "mine")
    assert done.status == 0, done.err
    assert "Sampled: of the model's 8 query heads 2, 3" in " ".join(done.out.split())
    for arguments in (("--policy", "tova"), ("--policy", "h2o", "--allocate", "ada"), ("--policy", "cake")):
        done = run("replay", "part", *arguments)
        assert done.status == 1
        what, todo = done.two_lines()
        assert "decides from all heads of a layer, and traces/part holds 2 of 8" in what
        assert "without --heads" in todo


def test_help_says_how_much_waits(run: Run) -> None:
    assert f"at most {IN_FLIGHT // 10**6} MB" in " ".join(run("trace", "--help").out.replace("│", " ").split())


def test_every_nth_row_is_for_reading(run: Run, record) -> None:
    record("part", "--query-stride", "4")
    assert "every 4th row" in run("info").out
    done = run("replay", "part", "--policy", "window")
    assert done.status == 1
    what, todo = done.two_lines()
    assert "every 4th row of attention" in what
    assert "--query-stride" in todo


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--heads", "2-x"), "is not a head"),
        (("--heads", "1"), "split a group of 2"),
        (("--query-stride", "0"), "query-stride"),
        (("--query-stride", "2", "--store", "topk:4"), "every n-th row only"),
        (("--store", "topk:none"), "not a number of weights"),
    ],
)
def test_what_cannot_be_recorded_is_said_in_two_lines(run: Run, options: tuple[str, str], said: str) -> None:
    Path("prompt.txt").write_text(TEXT)
    done = run("trace", "--model", "demo", "prompt.txt", *NEW, *options)
    assert done.status in (1, 2)
    assert said in done.err
    assert "Traceback" not in done.err
    assert not Path("traces/prompt-demo").exists()

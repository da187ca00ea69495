"""``kvscope score``, ``regret`` and ``spans``, as a user types them."""

import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from kvscope.analysis.regret import TokenInContext
from kvscope.cli.regret import in_context
from kvscope.cli.runs import how_to_name_one
from kvscope.metrics import METRICS
from kvscope.results.store import open_replay
from kvscope.trace.reader import open_trace
from tests.cli.conftest import Run, quietly

ROOT = Path(__file__).parent.parent.parent
(SEQUENCE,) = open_trace(ROOT / "traces" / "example").sequences
LAST = SEQUENCE.length - 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the committed trace, and a replay of two policies under two budgets."""
    folder = tmp_path_factory.mktemp("measures")
    shutil.copytree(ROOT / "traces" / "example", folder / "traces" / "example")
    with contextlib.chdir(folder):
        quietly("replay", "example", "-p", "window", "-p", "tova", "-b", "20%,40%", "-o", "two")
    return folder


@pytest.fixture
def example(run: Run, made: Path) -> None:
    """The current folder is a copy of that folder."""
    shutil.copytree(made, Path.cwd(), dirs_exist_ok=True)


def test_score_writes_another_replay(run: Run, example: None) -> None:
    done = run("score", "two", "--metric", "retained_mass", "--metric", "output_error")
    assert done.status == 0, done.err
    assert "reports/two-scored" in done.out
    header = json.loads(Path("reports/two-scored/run.json").read_text())
    assert list(header["metrics"]) == ["retained_mass", "output_error"]
    assert header["command"] == "kvscope score two --metric retained_mass --metric output_error"
    assert run("diff", "two", "two-scored", "--decisions", "-t", "1", "--json").status == 3, "metrics are missing"
    assert run("score", "-q").status == 0
    assert {path.name for path in Path("reports").iterdir()} == {"two", "two-scored", "two-scored-scored"}


def test_what_was_scored_is_what_was_replayed(run: Run, example: None) -> None:
    assert run("score", "two", "-o", "again", "-q").status == 0
    assert run("diff", "two", "again", "--decisions", "--tolerance", "1e-6").status == 0
    done = run("score", "two", "--json", "-q")
    assert set(json.loads(done.out)["runs"][0]["metrics"]) == set(METRICS.names())


def test_a_trace_without_values_says_which_metric_is_left_out(run: Run, small: Path) -> None:
    done = run("replay", "-p", "window", "--prefill", "stream", "-b", "30%")
    assert done.status == 0, done.err
    assert "Not computed: output_error. It needs values" in " ".join(done.out.split())
    what, todo = run("score", "--metric", "output_error").two_lines()
    assert "output_error needs values" in what and "--store" in todo


def test_regret_of_one_run_lists_evictions(run: Run, example: None) -> None:
    done = run("regret", "two", "--policy", "window", "--budget", "20%", "--top", "3")
    assert done.status == 0, done.err
    for part in ("window 20% open", "lag", "digits", "kinds of tokens", "lags", "on evicted keys"):
        assert part in done.out
    assert "\N{LEFT-POINTING DOUBLE ANGLE QUOTATION MARK}" in done.out
    found = json.loads(run("regret", "two", "-p", "window", "-b", "20%", "--json", "-q").out)
    (only,) = found["runs"]
    assert (only["policy"], only["budget"], len(only["worst"])) == ("window", "20%", 20)
    assert sum(each["share"] for each in only["lags"]) == pytest.approx(1)


def test_one_of_both_loops_is_named_by_its_number(run: Run, example: None) -> None:
    runs = open_replay(Path("reports/two")).info.runs
    assert how_to_name_one(runs) == "--policy and --budget"
    both = [runs[0], dataclasses.replace(runs[0], run=7, loop="closed")]
    assert how_to_name_one(both) == "--policy 0 (open loop) or --policy 7 (closed loop)"
    assert "name it with --policy and --budget." in run("regret", "two").out


def test_regret_of_several_runs_is_a_line_each(run: Run, example: None) -> None:
    done = run("regret", "two")
    assert done.status == 0, done.err
    assert all(f"{policy} {budget} open" in done.out for policy in ("window", "tova") for budget in ("20%", "40%"))
    assert "most regret" in done.out
    assert len(json.loads(run("regret", "two", "--json", "-q").out)["runs"]) == 4


def test_regret_where_nothing_is_missed(run: Run, example: None) -> None:
    assert run("replay", "example", "-p", "full", "-o", "all", "-q").status == 0
    done = run("regret", "all")
    assert done.status == 0, done.err
    assert "no evicted key was attended to again" in done.out


def test_spans_of_one_run_layer_by_layer(run: Run, example: None) -> None:
    arguments = ["spans", "two", "-p", "window", "-b", "20%", "--span", "fact=text:Clara holds", "--span", "q=70:91"]
    done = run(*arguments)
    assert done.status == 0, done.err
    assert "fact = 14:19" in done.out
    assert "fact-2 = 86:91" in done.out, "the words stand twice in the text"
    found = json.loads(run(*arguments, "--json", "-q").out)
    (only,) = found["runs"]
    assert [span["name"] for span in only["spans"]] == ["fact", "fact-2", "q"]
    fact, _, question = (span["layers"][0] for span in only["spans"])
    assert [each["step"] for each in fact["at"]] == [SEQUENCE.prompt - 1, LAST]
    assert fact["at"][0]["held"] == 0, "a window of a fifth has lost the beginning"
    assert fact["half_gone"] == SEQUENCE.prompt - 1 and question["half_gone"] > SEQUENCE.prompt
    assert [layer["layer"] for layer in only["spans"][0]["layers"]] == ["all", 0, 1, 2, 3]


def test_spans_of_several_runs_at_chosen_steps(run: Run, example: None) -> None:
    done = run("spans", "two", "--span", "q=0:5", "--at", "50", "--at", "100")
    assert done.status == 0, done.err
    assert "held at 50" in " ".join(done.out.split()) or "at 50" in done.out
    assert "tova 40% open" in done.out


@pytest.mark.parametrize(
    ("arguments", "what", "todo"),
    [
        (["spans", "two"], "no span", "--span"),
        (["spans", "two", "--span", "5:9"], "no name", "NAME=120:140"),
        (["spans", "two", "--span", "a=text:nowhere"], "is not in the sequence", "positions"),
        (["spans", "two", "--span", "a=0:900"], f"not a range within {SEQUENCE.length} tokens", "START:STOP"),
        (["spans", "two", "--span", "a=0:9", "--at", "900"], "no step 900", str(LAST)),
        (["spans", "two", "--span", "a=0:9", "--sequence", "3"], "no sequence 3", "from 0 to 0"),
        (["spans", "two", "--span", "a=0:9", "-p", "h2o"], "no policy 'h2o'", "tova"),
        (["regret", "two", "-b", "30%"], "no such run at 30%", "20%, 40%"),
        (["regret", "two", "--top", "0"], "--top", "--help"),
        (["score", "two", "--metric", "retained"], "retained", "retained_mass"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage(run: Run, example: None, arguments: list[str], what: str, todo: str) -> None:
    done = run(*arguments)
    said = done.two_lines()
    assert done.status == 2
    assert what in said[0]
    assert todo in said[1]
    assert done.out == ""
    assert {path.name for path in Path("reports").iterdir()} == {"two"}


def test_a_trace_that_has_moved(run: Run, example: None) -> None:
    Path("traces/example").rename("elsewhere")
    for command in (["score", "two"], ["regret", "two"], ["spans", "two", "--span", "a=text:Clara"]):
        what, todo = run(*command).two_lines()
        assert "traces/example" in what and "--trace" in todo
    assert run("regret", "two", "--trace", "elsewhere", "--top", "1").status == 0
    assert run("spans", "two", "--span", "a=0:4").status == 0, "positions need no trace"
    Path("traces").mkdir(exist_ok=True)
    assert run("trace", "--model", "demo", str(ROOT / "traces/example.txt"), "-o", "other", "-q").status == 0
    what, todo = run("regret", "two", "--trace", "other").two_lines()
    assert "was not made from" in what and "--trace" in todo


def test_a_token_in_context_is_one_line() -> None:
    token: TokenInContext = {"text": " b", "kind": "other", "before": "a\n", "after": "\nc"}
    assert "\n" not in in_context(token) and " b" in in_context(token)


def test_runs_without_a_budget_are_called_so(run: Run, example: None) -> None:
    """Those of the full cache, and of policies that choose the size of their cache."""
    done = run("replay", "example", "-p", "full", "-p", "attention-gate", "-o", "free", "-q")
    assert done.status == 0, done.err
    found = json.loads(run("regret", "free", "--json").out)
    assert [item["budget"] for item in found["runs"]] == [None, None]
    shown = run("regret", "free").out
    assert "full no budget open" in shown and "attention-gate no budget open" in shown
    what, todo = run("regret", "free", "--budget", "30%").two_lines()
    assert "no such run at 30%" in what and todo == "Omit --budget: these policies have no budget."

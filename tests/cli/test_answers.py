"""Generated answers on the command line: what is printed, and what is refused in two lines."""

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run

NOTE = "\nNote: Fred has 317.\n\n It was late, and the others had gone.\nQuestion: what has Fred? Answer: Fred has"


@pytest.fixture
def notes(run: Run, tmp_path: Path) -> Path:
    lines = [{"prompt": NOTE, "answers": ["317"], "metric": "exact", "task": "notes", "length": 40}, {"prompt": NOTE}]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run("trace", "--model", "demo", "notes.jsonl", "--max-new-tokens", "4", "-o", "notes", "--quiet")
    assert done.status == 0, done.err
    return Path("traces/notes")


def test_answers_are_generated_scored_and_printed(run: Run, notes: Path) -> None:
    go = ("replay", "notes", "-p", "full", "-p", "window", "-b", "8", "--generate", "-o", "r", "--quiet")
    done = run(*go)
    assert done.status == 0, done.err
    assert "right answers" in done.out and "1 of 2 sequences have no right answers." in done.out
    printed = run(*go, "--force", "--json")
    summary = json.loads(printed.out)
    closed = {each["policy"]: each for each in summary["runs"] if each["loop"] == "closed"}
    assert closed["full"]["metrics"]["answer_score"]["mean"] == 1
    assert closed["window"]["metrics"]["answer_score"]["mean"] == 0, "the number is evicted"
    assert [(task["task"], task["length"]) for task in closed["window"]["tasks"]] == [("notes", 40)]
    assert summary["schema"] == 2
    assert run("diff", "r", "r").status == 0
    exported = run("export", "r", "--format", "csv", "-o", "e", "--quiet")
    assert exported.status == 0 and "examples.csv" in exported.out and "tasks.csv" in exported.out


def test_options_of_answers_need_generate(run: Run, notes: Path) -> None:
    what, todo = run("replay", "notes", "-p", "window", "-b", "8", "--max-new-tokens", "3").two_lines()
    assert (what, todo) == ("--max-new-tokens and --score need generated answers", "Add --generate.")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-p", "recycled-attention"), "keys that a smaller cache does not hold"),
        (("-p", "ideal"), "cannot run in the closed loop"),
        (("-p", "window", "--score", "exakt"), "no score is called 'exakt'"),
    ],
)
def test_what_cannot_be_generated_is_refused(run: Run, notes: Path, options: tuple[str, ...], said: str) -> None:
    done = run("replay", "notes", "-b", "8", "--generate", *options)
    assert done.status in (1, 2) and said in done.two_lines()[0]
    assert not list(Path("reports").glob("*")), "nothing is left behind"


def test_a_trace_without_answers_is_refused(run: Run, small: Path) -> None:
    what, todo = run("replay", "small", "-p", "window", "-b", "8", "--generate").two_lines()
    assert what == "traces/small has no right answers, so answers under a policy cannot be scored"
    assert todo == "Record it again with --answer, or from a dataset with answers."

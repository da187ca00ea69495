"""``kvscope tasks``: lists, shows and writes examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvscope.cli.app import run
from kvscope.model.prompt_files import read_prompts
from kvscope.tasks import TASKS
from tests.cli.conftest import Run


def test_list_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tasks", "list", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == TASKS.names()
    assert run(["tasks", "list"]) == 0
    assert "variable-tracking" in capsys.readouterr().out
    assert run(["tasks", "show", "needle:digits=4"]) == 0
    assert "Question: which number belongs to" in capsys.readouterr().out
    assert run(["tasks", "show", "copying", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["example"]["task"] == "copying"


def test_make_writes_prompts_of_at_most_so_many_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tasks.jsonl"
    command = ["tasks", "make", "needle:wording=notes", "facts", "-l", "150", "-l", "200", "-n", "2", "--model", "demo"]
    assert run([*command, "-o", str(file)]) == 0
    first = file.read_bytes()
    lines = [json.loads(line) for line in first.decode().splitlines()]
    assert [line["length"] for line in lines] == [150, 150, 200, 200] * 2
    prompts = read_prompts([file], None)
    assert [one.answers for one in prompts] == [tuple(line["answers"]) for line in lines]
    assert run([*command, "-o", str(file)]) == 1, "an existing file is kept"
    assert run([*command, "-o", str(file), "--force"]) == 0
    assert file.read_bytes() == first
    capsys.readouterr()
    assert run([*command, "-o", "-"]) == 0
    assert capsys.readouterr().out.encode() == first


def test_tokens_are_those_of_the_model(tmp_path: Path) -> None:
    from kvscope.core.options import ModelSource
    from kvscope.model.token_count import token_counter

    file = tmp_path / "tasks.jsonl"
    assert run(["tasks", "make", "needle", "-l", "300", "-n", "2", "--model", "demo", "-o", str(file)]) == 0
    count = token_counter(ModelSource("demo"))
    assert all(200 < count(one.text) <= 300 for one in read_prompts([file], None))


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["needel", "-l", "100"], 2),
        (["needle"], 2),
        (["needle", "-l", "5"], 2),
        (["needle", "-l", "100", "--haystack", "missing.txt"], 2),
        (["needle", "-l", "100", "--model", "no/such-model"], 1),
        (["needle", "-l", "100", "-o", "missing/folder/t.jsonl"], 1),
    ],
)
def test_two_lines_for_a_mistake(
    arguments: list[str],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["tasks", "make", *arguments]) == status
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert not list(tmp_path.iterdir())


def test_regret_names_the_needle_that_was_evicted(run: Run) -> None:
    made = run("tasks", "make", "needle:wording=notes", "--length", "60", "-n", "1", "--model", "demo", "-o", "n.jsonl")
    assert made.status == 0, made.err
    assert run("trace", "--model", "demo", "n.jsonl", "--max-new-tokens", "4", "-o", "n", "--quiet").status == 0
    assert run("replay", "n", "-p", "window", "-b", "20", "-o", "r", "--quiet").status == 0
    done = run("regret", "r", "--policy", "window", "--top", "200")
    assert done.status == 0, done.err
    table = done.out.partition("spans of the prompts")[2]
    assert "needle" in table and "needle" in done.out.partition("tokens, over all layers")[0]
    found = json.loads(run("regret", "r", "--json", "--top", "200", "--quiet").out)["runs"][0]
    named = {each["key"] for each in found["worst"] if each["span"] == "needle"}
    spans = json.loads(Path("traces/n/trace.json").read_text())["sequences"][0]["spans"]
    inside = {key for span in spans if span["name"] == "needle" for key in range(span["start"], span["stop"])}
    assert named and named <= inside

"""What `kvscope trace` prints of the text that followed each prompt, and what travels from a dataset into the trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvscope.cli.app import run
from kvscope.cli.said import MOST, show_said, what_was_said
from kvscope.trace.reader import open_trace

ASKED = "Note: Clara holds 583.\n\nQuestion: what holds Clara? Answer: Clara holds"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text(ASKED)


def record(*arguments: str) -> int:
    return run(["trace", "--model", "demo", *arguments, "--max-new-tokens", "4", "-o", "t", "-q"])


def test_a_right_and_a_wrong_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert record("p.txt", "--answer", "583") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Answer: Clara holds" in out
    assert "583: right (any)" in out
    assert record("p.txt", "--answer", "584", "--force", "--json") == 0
    (said,) = json.loads(capsys.readouterr().out)["said"]
    assert said["prompt_end"].endswith("Clara holds") and said["text"].strip().startswith("583")
    assert (said["answers"], said["metric"], said["score"]) == (["584"], "any", 0.0)


def test_without_answers_what_was_said_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert record("p.txt") == 0
    out = capsys.readouterr().out
    assert "said" in out and "583" in out and "right" not in out and "wrong" not in out


def test_a_forced_continuation_is_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.txt").write_text(" 584.")
    assert record("p.txt", "--continuation", "c.txt", "--answer", "583") == 0
    out = capsys.readouterr().out
    assert "forced" in out and "wrong" not in out
    assert what_was_said(open_trace(tmp_path / "traces" / "t"))[0]["score"] is None


def test_facts_and_spans_of_a_dataset_are_in_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = ["tasks", "make", "needle:wording=notes", "-l", "150", "-n", "4", "--model", "demo", "-o", "t.jsonl"]
    assert run(make) == 0
    assert record("t.jsonl") == 0
    out = capsys.readouterr().out
    assert "The first 3 of 4 sequences" in out and "Mean score of 4 answers" in out
    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    trace = open_trace(tmp_path / "traces" / "t", verify=True)
    for number, (line, sequence) in enumerate(zip(lines, trace.record.sequences, strict=True)):
        assert sequence.example is not None
        facts = sequence.example
        assert (facts.id, facts.task, facts.metric, facts.length) == (line["id"], line["task"], "all", 150)
        assert facts.depth == pytest.approx(line["depth"])
        texts = list(trace.tokens(number)["text"])
        assert [span.name for span in sequence.spans] == [span["name"] for span in line["spans"]]
        for span, given in zip(sequence.spans, line["spans"], strict=True):
            text = "".join(texts[span.start : span.stop])
            assert line["prompt"][given["start"] : given["stop"]] in text
            assert len(text.strip()) <= given["stop"] - given["start"] + 2, "no more than a piece of a token around it"
    assert run(["replay", "t", "-p", "h2o", "--budget", "20%", "-o", "r", "-q"]) == 0
    capsys.readouterr()
    assert run(["spans", "r", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["runs"][0]["spans"]
    assert [span["name"] for span in found] == ["needle", "question"]


def test_spans_of_a_prompt_without_any(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert record("p.txt") == 0
    assert run(["replay", "t", "-p", "h2o", "--budget", "20%", "-o", "r", "-q"]) == 0
    capsys.readouterr()
    assert run(["spans", "r"]) == 2
    assert "no span is given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "answers", "message"),
    [
        (["p.txt", "p.txt"], ["1"], "--answer is for one prompt, and there are 2"),
        (["a.jsonl"], ["1"], "has answers of its own"),
        (["p.txt"], [" "], "--answer is empty"),
    ],
)
def test_answers_that_do_not_fit(
    files: list[str], answers: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "answers": ["b"]}')
    assert record(*files, *(part for answer in answers for part in ("--answer", answer))) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('"spans": 3', "spans is not a list"),
        ('"spans": [{"name": "a", "start": 0}]', "span 0 has not name, start and stop"),
        ('"spans": [{"name": "a", "start": 0, "stop": 9}]', "span 0 is 0 to 9, of a prompt of 5 characters"),
        ('"spans": [{"name": "a", "start": 2, "stop": 2}]', "span 0 is 2 to 2"),
        ('"task": ["a"]', "task is not a text"),
        ('"depth": 2', "depth is not between 0 and 1"),
    ],
)
def test_facts_that_are_none(fields: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "a b c", {fields}}}')
    assert record("a.jsonl") == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 2


def test_hostile_text_stays_text(capsys: pytest.CaptureFixture[str]) -> None:
    one = {"sequence": 0, "prompt_end": "[bold]\x1b[31m", "text": "a\nb\x07", "forced": False}
    show_said([{**one, "answers": ["[/x]"], "metric": "any", "score": 0.0}])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and "[bold]" in out and "a\\nb" in out and "[/x]: wrong" in out


def test_long_texts_are_cut_and_marked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    long, none = "word " * 400, {"answers": None, "metric": None, "score": None}
    show_said([{"sequence": 0, "prompt_end": long[-MOST - 2 : -2], "text": long, "forced": False, **none}])
    prompt, text = (line for line in capsys.readouterr().out.splitlines() if "word" in line)
    assert "... word word" in prompt, "it begins at a word"
    assert text.rstrip().endswith("word  ...")
    assert max(len(prompt.rstrip()), len(text.rstrip())) < MOST + 20
    show_said([{"sequence": 0, "prompt_end": "short", "text": "too", "forced": False, **none}])
    assert "..." not in capsys.readouterr().out

"""Datasets as benchmarks and the Hub publish them: Parquet, folders, templates, RULER and LongBench."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvscope.core.errors import UsageError
from kvscope.model.benchmarks import LONGBENCH_SCORES
from kvscope.model.prompt_files import read_prompts
from kvscope.tasks.scoring import score

RULER = {"index": 3, "input": "A magic number is 42. What is it?", "outputs": ["42", "43"], "length": 4096}
LONGBENCH = {
    "input": "Who?",
    "context": "Once there was a cat.",
    "answers": ["The cat"],
    "length": 5,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "f00d",
}


def lines(file: Path, *entries: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def test_parquet_rows_are_objects(tmp_path: Path) -> None:
    rows = [
        {"question": "How many?", "answers": ["4"], "length": 7, "id": "a", "picture": b"x"},
        {"question": "Who?", "answers": None, "length": None, "id": "b", "picture": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "é.parquet")
    one, other = read_prompts([tmp_path / "é.parquet"], None)
    assert (one.text, one.answers, one.field) == ("How many?", ("4",), "question")
    assert one.example is not None and (one.example.id, one.example.length) == ("a", 7)
    assert (other.text, other.answers) == ("Who?", None)
    assert other.place.endswith("é.parquet, row 2")
    chat = [{"messages": [{"role": "user", "content": "Hello"}]}]
    pq.write_table(pa.Table.from_pylist(chat), tmp_path / "chat.parquet")
    assert read_prompts([tmp_path / "chat.parquet"], None)[0].messages == ({"role": "user", "content": "Hello"},)


@pytest.mark.parametrize(
    ("content", "told"), [(b"prompt\nHello", "is not a Parquet file"), (None, "is empty"), (b"", "not a Parquet file")]
)
def test_what_is_no_parquet_is_refused(tmp_path: Path, content: bytes | None, told: str) -> None:
    file = tmp_path / "p.parquet"
    if content is None:
        pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), file)
    else:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=told):
        read_prompts([file], None)
    with pytest.raises(UsageError, match="No such file"):
        read_prompts([tmp_path / "none.parquet"], None)


def test_a_folder_is_its_files_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    with pytest.raises(UsageError, match="texts has no files"):
        read_prompts([folder], None)
    for name, text in (("b.txt", "second"), ("a.md", "first"), (".hidden", "no")):
        (folder / name).write_text(text)
    lines(folder / "c.jsonl", {"prompt": "third"}, {"prompt": "fourth"})
    assert [one.text for one in read_prompts([folder], None)] == ["first", "second", "third", "fourth"]
    (folder / "deeper").mkdir()
    with pytest.raises(UsageError, match="texts has a folder in it: deeper"):
        read_prompts([folder], None)


def test_a_template_makes_the_prompt(tmp_path: Path) -> None:
    file = lines(tmp_path / "p.jsonl", LONGBENCH)
    template = "{{Text}} {context}\nQ: {input} ({length})"
    (found,) = read_prompts([file], None, template=template)
    assert found.text == "{Text} Once there was a cat.\nQ: Who? (5)"
    assert found.field == template
    assert found.answers == ("The cat",)
    with pytest.raises(UsageError, match="line 1: no field contxt, which the template has") as caught:
        read_prompts([file], None, template="{contxt}")
    assert "context" in caught.value.todo


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{", "--template: "),
        ("no field", "has no field in it"),
        ("{}", "'' is not the name of a field"),
        ("{context!r}", "'context' is not the name"),
        ("{context:>9}", "'context' is not the name"),
        ("{context.x}", "'context.x' is not the name"),
    ],
)
def test_what_is_no_template(tmp_path: Path, template: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        read_prompts([lines(tmp_path / "p.jsonl", LONGBENCH)], None, template=template)


def test_a_template_is_for_objects_without_spans(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("text")
    with pytest.raises(UsageError, match=r"--template: .*p.txt is one text without fields"):
        read_prompts([tmp_path / "p.txt"], None, template="{input}")
    spans = {"prompt": "abc", "spans": [{"name": "fact", "start": 0, "stop": 1}]}
    with pytest.raises(UsageError, match="its spans do not refer to the prompt that --template makes"):
        read_prompts([lines(tmp_path / "p.jsonl", spans)], None, template="Say {prompt}")
    with pytest.raises(UsageError, match="both given"):
        read_prompts([lines(tmp_path / "p.jsonl", spans)], None, field="prompt", template="Say {prompt}")


@pytest.mark.parametrize(
    ("path", "task", "metric"),
    [
        ("niah_multikey_2/validation.jsonl", "niah_multikey_2", "all"),
        ("data/vt.jsonl", "vt", "all"),
        ("qa_1/validation.jsonl", "qa_1", "any"),
        ("mine/validation.jsonl", None, None),
        ("qatar/validation.jsonl", None, None),
    ],
)
def test_ruler_files_are_scored_as_their_path_says(
    tmp_path: Path, path: str, task: str | None, metric: str | None
) -> None:
    (found,) = read_prompts([lines(tmp_path / path, RULER)], None)
    assert (found.text, found.answers) == (RULER["input"], ("42", "43"))
    assert found.example is not None
    assert (found.example.id, found.example.task, found.example.metric) == ("3", task, metric)
    assert found.example.length == 4096


def test_longbench_files_are_scored_as_their_dataset(tmp_path: Path) -> None:
    for dataset, metric in [*LONGBENCH_SCORES.items(), ("qasper_e", "f1"), ("mine", None)]:
        (found,) = read_prompts([lines(tmp_path / "p.jsonl", {**LONGBENCH, "dataset": dataset})], None)
        assert found.example is not None
        assert (found.example.task, found.example.metric, found.example.id) == (dataset, metric, "f00d")
        assert (found.text, found.field) == ("Once there was a cat.\n\nWho?", "context+input")
    (own,) = read_prompts([lines(tmp_path / "p.jsonl", {**LONGBENCH, "metric": "exact"})], None)
    assert own.example is not None and own.example.metric == "exact"
    named = {**LONGBENCH, "dataset": "trec", "all_classes": ["Number", "Number of people"]}
    (classed,) = read_prompts([lines(tmp_path / "p.jsonl", named)], None)
    assert classed.example is not None and classed.example.classes == ("Number", "Number of people")
    assert own.example.classes == ()
    with pytest.raises(UsageError, match="classes are not a list of texts"):
        read_prompts([lines(tmp_path / "p.jsonl", {**named, "all_classes": "Number"})], None)


CLASSES = ["Number", "Number of people", "Date", "City", "Person"]


@pytest.mark.parametrize(
    ("said", "answer", "points"),
    [
        ("Date", "Date", 1.0),
        ("\nDate\nCity", "Date", 1.0),
        ("Date or City", "Date", 0.5),
        ("Number of people", "Number of people", 1.0),  # `Number` is part of the right class
        ("Number of people", "Number", 0.5),
        ("a date", "Date", 0.0),
        ("City", "Date", 0.0),
        ("", "Date", 0.0),
    ],
)
def test_classes_are_scored_as_longbench_scores_them(said: str, answer: str, points: float) -> None:
    assert score("classification", said, [answer], CLASSES) == points


def test_classification_needs_classes() -> None:
    with pytest.raises(UsageError, match="no classes to score with"):
        score("classification", "Date", ["Date"])


@pytest.mark.parametrize(
    ("metric", "said", "answers", "points"),
    [
        # RULER, scripts/eval/synthetic/constants.py: string_match_all and string_match_part
        ("all", "It is 42, I think.", ["42", "43"], 0.5),
        ("any", "It is 42, I think.", ["42", "43"], 1.0),
        # LongBench, metrics.py: qa_f1_score; count_score and retrieval_score; code_sim_score
        ("f1", "the black cat", ["The cat", "A dog"], 2 / 3),
        ("f1-line", "\n\nthe cat\nand much more", ["cat"], 1.0),
        ("f1-line", "dog\ncat", ["cat"], 0.0),
        ("numbers", "Paragraph 5 or paragraph 7", ["Paragraph 5"], 0.5),
        ("numbers", "15", ["5"], 0.0),
        ("numbers", "none", ["5"], 0.0),
        ("numbers", "5", ["5"], 1.0),
        ("code", "\n# a comment\nreturn total\nreturn other", ["return total"], 1.0),
        ("code", "abcd", ["abxd"], 0.75),
        ("code", "# nothing else", ["return"], 0.0),
    ],
)
def test_benchmarks_scores(metric: str, said: str, answers: list[str], points: float) -> None:
    assert score(metric, said, answers) == pytest.approx(points)

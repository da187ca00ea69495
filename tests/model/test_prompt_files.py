"""Every form in which people keep prompts is read, and what is none is refused by file and line."""

import gzip
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from kvscope.core import text_files
from kvscope.core.errors import UsageError
from kvscope.core.text_files import read_text
from kvscope.core.text_names import text_ending, text_name
from kvscope.model.prompt_files import PromptText, read_prompts

RULER = {"index": 0, "input": "Find the key.", "outputs": ["42", "43"], "length": 4096}
LONGBENCH = {"input": "Who?", "context": "Once upon a time.", "answers": ["A cat"], "length": 3, "dataset": "qa"}
CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


def read(file: Path, text: str, **options: object) -> list[PromptText]:
    file.write_text(text, encoding="utf-8", newline="")
    return read_prompts([file], None, **options)


@pytest.mark.parametrize(
    ("entry", "text", "answers", "field"),
    [
        (RULER, "Find the key.", ("42", "43"), "input"),
        (LONGBENCH, "Once upon a time.\n\nWho?", ("A cat",), "context+input"),
        ({**LONGBENCH, "input": ""}, "Once upon a time.", ("A cat",), "context+input"),
        ({"context": "Once.", "question": "Who?"}, "Once.\n\nWho?", None, "context+question"),
        ({"text": "a", "answer": 7}, "a", ("7",), "text"),
        ({"prompt": "a", "input": "b", "text": "c"}, "a", None, "prompt"),
        ({"question": "How many?", "answer": "4"}, "How many?", ("4",), "question"),
    ],
)
@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "p.JSONL", "p.json", "p"])
def test_forms_of_benchmarks(
    tmp_path: Path, name: str, entry: dict, text: str, answers: tuple | None, field: str
) -> None:
    (found,) = read(tmp_path / name, json.dumps(entry))
    assert (found.text, found.answers, found.field) == (text, answers, field)
    two = read(tmp_path / name, json.dumps(entry) + "\n\n" + json.dumps(entry) + "\n")
    assert [one.text for one in two] == [text, text]
    assert two[1].place == f"{tmp_path / name}, line 3"


def test_lists_of_objects_and_chats(tmp_path: Path) -> None:
    texts = read(tmp_path / "p.json", json.dumps([RULER, LONGBENCH], indent=2))
    assert [one.text for one in texts] == ["Find the key.", "Once upon a time.\n\nWho?"]
    assert texts[1].place == f"{tmp_path / 'p.json'}, object 2"
    (chat,) = read(tmp_path / "p.jsonl", json.dumps(CHAT))
    assert chat.messages == ({"role": "user", "content": "Hello"},) and chat.field == "messages"
    (chat,) = read(tmp_path / "p.jsonl", json.dumps({"prompt": CHAT["messages"]}))
    assert chat.messages == ({"role": "user", "content": "Hello"},)


@pytest.mark.parametrize("ending", [".csv", ".TSV", ".yaml", ".csv.gz"])
def test_tables_are_no_prose(tmp_path: Path, ending: str) -> None:
    with pytest.raises(UsageError, match="is a table, not a text"):
        read(tmp_path / f"p{ending}", "prompt,answer\nHow many?,4\n")
    assert read(tmp_path / "p.csv.txt", "a,b")[0].text == "a,b"


def test_a_named_field(tmp_path: Path) -> None:
    (found,) = read(tmp_path / "p.jsonl", json.dumps({**RULER, "title": "the title"}), field="title")
    assert (found.text, found.field, found.answers) == ("the title", "title", ("42", "43"))
    with pytest.raises(UsageError, match=r"p\.jsonl, line 1: no field body among its fields \(index, input"):
        read(tmp_path / "p.jsonl", json.dumps(RULER), field="body")
    with pytest.raises(UsageError, match="one text without fields"):
        read(tmp_path / "p.txt", "text", field="body")


def zstd_of(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


@pytest.mark.parametrize("pack", [gzip.compress, zstd_of])
@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.jsonl.zst", "p.jsonl"])
def test_compressed_files(tmp_path: Path, pack, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(pack((json.dumps(RULER) + "\n").encode()))
    assert [one.text for one in read_prompts([file], None)] == ["Find the key."]
    file.write_bytes(pack((json.dumps(RULER) + "\n").encode() * 50)[:-9])
    with pytest.raises(UsageError, match="cannot be decompressed"):
        read_prompts([file], None)
    if name != "p.jsonl":
        file.write_text(json.dumps(RULER))
        with pytest.raises(UsageError, match="is not compressed, although its name ends in"):
            read_prompts([file], None)


def test_names() -> None:
    assert [text_name(name) for name in ("a/b.txt", "b.jsonl.gz", "c.ZST", "-", "x.y.json")] == [
        *("b", "b", "c", "stdin", "x.y")
    ]
    assert [text_ending(name) for name in ("b.JSONL.gz", "b.txt", "b", "-", "b.gz")] == [".jsonl", ".txt", "", "", ""]


def test_byte_order_marks_and_line_ends(tmp_path: Path) -> None:
    (found,) = read(tmp_path / "p.txt", "\ufeffone\r\ntwo\r\n")
    assert found.text == "one\ntwo\n"
    found = read(tmp_path / "p.jsonl", '\ufeff{"prompt": "\\ufeffone"}\r\n\ufeff{"text": "two"}\r\n')
    assert [one.text for one in found] == ["one", "two"]
    (found,) = read(tmp_path / "p.jsonl", json.dumps({"messages": [{"role": "user", "content": "\ufeffone"}]}))
    assert found.messages[0]["content"] == "one"


def test_only_new_lines_end_lines(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four"
    found = read(tmp_path / "p.jsonl", json.dumps({"prompt": text}, ensure_ascii=False) + '\n{"prompt": "b"}')
    assert [one.text for one in found] == [text, "b"]


def test_standard_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def given(content: str) -> None:
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))

    given(json.dumps(RULER))
    assert [one.text for one in read_prompts(["-"], None)] == ["Find the key."]
    given("Once upon a time { and so on")
    (found,) = read_prompts([Path("-")], None)
    assert (found.text, found.place) == ("Once upon a time { and so on", "standard input")
    given('[1] is a reference, {"a": 1} an object')
    assert read_prompts(["-"], None)[0].text.startswith("[1] is")
    given("a")
    with pytest.raises(UsageError, match="named twice"):
        read_prompts(["-"], Path("-"))
    given("from a pipe")
    assert read_text("-") == "from a pipe"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: no prompt: this is not JSON"),
        ('{"prompt": "a"}\n{"prompt": "b"', "line 2: no prompt: this is not JSON"),
        ("[]", "line 1: no prompt: this is not an object"),
        ('{"prompt": "a", "prompt": "b"}', "line 1: no prompt: .*it has the field prompt twice"),
        ('{"title": "a"}', r"line 1: no prompt among its fields \(title\)"),
        ('{"prompt": 3}', "prompt is not a text"),
        ('{"prompt": "a", "continuation": 3}', "continuation is not a text"),
        ('{"prompt": "\\ud83d"}', r"line 1 contains half a character: '\\ud83d'"),
        ('{"prompt": "a", "continuation": "\\ude42"}', "contains half a character"),
        ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', "contains half a character"),
        ('{"messages": []}', "has no messages"),
        ('{"messages": [{"content": "a"}]}', "a message has no role"),
        ('{"prompt": " "}', r"prompt .*p\.jsonl, line 1 is empty"),
        ("[" * 100_000, "line 1: no prompt"),
        ("\0", "zero bytes"),
    ],
)
def test_what_is_no_prompt(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read(tmp_path / "p.jsonl", content)
    assert caught.value.todo


def test_whole_surrogate_pairs_are_characters(tmp_path: Path) -> None:
    (found,) = read(tmp_path / "p.jsonl", '{"prompt": "\\ud83d\\ude42"}')
    assert found.text == "🙂"


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_a_compressed_file_that_would_fill_memory_is_refused(tmp_path: Path, ending: str, monkeypatch) -> None:
    monkeypatch.setattr(text_files, "ALWAYS_ALLOWED", 10_000)
    pack = gzip.compress if ending == "gz" else lambda text: pa.compress(text, "zstd", asbytes=True)
    file = tmp_path / f"p.jsonl.{ending}"
    file.write_bytes(pack(b" " * 2_000_000))
    with pytest.raises(UsageError, match="more than 100 times its size"):
        text_files.read_text(file)
    file.write_bytes(pack(b"a text " * 1400))
    assert text_files.read_text(file) == "a text " * 1400

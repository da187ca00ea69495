"""Prompts on the command line: conversations, answers, options of the template, and what is printed about tokens."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

from kvscope.trace.schema import SCHEMA_VERSION
from tests.cli.conftest import Run
from tests.model.test_chat import THINKING
from tests.model.tiny import build
from tests.model.tokenizer_kinds import make


def test_conversations_and_answers(run: Run) -> None:
    model = build("llama")
    model.resize_token_embeddings(400)
    model.save_pretrained("chat")
    tokenizer = make("byte-level", "both")
    tokenizer.chat_template = "{{ bos_token }}" + THINKING
    tokenizer.save_pretrained("chat")
    lines = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], "answers": ["Ha"]},
        {"input": "Who?", "outputs": ["A cat", "A dog"]},
    ]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    flags = ["--chat", "--chat-option", "enable_thinking=false", "--max-new-tokens", "2", "-o", "t", "-q"]
    done = run("trace", "--model", "chat", "p.jsonl", *flags)
    assert done.status == 0, done.err
    record = json.loads(Path("traces/t/trace.json").read_text())
    assert [one.get("answers") for one in record["sequences"]] == [["Ha"], ["A cat", "A dog"]]
    assert [one["field"] for one in record["prompts"]] == ["messages", "input"]
    assert record["prompts"][0]["text"] == "<s><|user|>Hi<|assistant|>Ho"
    assert record["prompts"][1]["text"] == "<s><|user|>Who?<|assistant|><think></think>"
    assert record["schema"] == SCHEMA_VERSION
    Path("p.txt").write_text("<s>Once upon")
    done = run("trace", "--model", "chat", "p.txt", "--max-new-tokens", "1", "-o", "u", "-q")
    assert done.status == 0 and "begins with <s>: none is added" in done.err
    for flag in ("enable_thinking", "other=1", "enable_thinking=1"):
        done = run("trace", "--model", "chat", "p.txt", "--chat-option", flag, "-o", "v")
        assert done.status == 2 and done.two_lines()


def test_prompts_from_standard_input(run: Run, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b'{"prompt": "Once upon a time"}')))
    done = run("trace", "--model", "demo", "-", "--max-new-tokens", "1", "-q")
    assert done.status == 0, done.err
    record = json.loads(Path("traces/stdin-demo/trace.json").read_text())
    assert record["prompts"][0]["file"] == "standard input"


def test_a_named_field(run: Run) -> None:
    Path("p.json").write_text(json.dumps([{"title": "Once upon"}, {"title": "The answer"}]))
    assert "--field" in run("trace", "--model", "demo", "p.json").two_lines()[1]
    done = run("trace", "--model", "demo", "p.json", "--field", "title", "--max-new-tokens", "1", "-q")
    assert done.status == 0, done.err
    assert len(json.loads(Path("traces/p-demo/trace.json").read_text())["sequences"]) == 2

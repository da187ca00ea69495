"""``kvscope gate train``: what a person types, what they get, and what they are told when it cannot be."""

import json
from pathlib import Path

import pytest

from kvscope.gates.module import load_gate
from tests.cli.conftest import Run
from tests.model.tiny import saved
from tests.training.test_training import corpus

QUICK = ("--steps", "6", "--every", "3", "--window", "16", "--tokens", "32", "--head-size", "4", "-q")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A tiny model, and a text of its words."""
    corpus(tmp_path)
    return saved(tmp_path / "model")


def test_train_trace_and_replay(run: Run, model: Path) -> None:
    done = run("gate", "train", "--model", model, "--text", "words.txt", *QUICK)
    assert done.status == 0, done.err
    assert "keys retained" in done.out and "gate.safetensors" in done.out
    Path("prompt.txt").write_text("w1 w2 w3 w4 w5 w6")
    assert run("trace", "--model", model, "prompt.txt", "--max-new-tokens", "4", "--hidden", "-q").status == 0
    done = run("replay", "--policy", "attention-gate:gate=gate.safetensors", "--perplexity", "--json")
    assert done.status == 0, done.err
    rows = json.loads(done.out)["runs"]
    assert [row["loop"] for row in rows] == ["open", "closed"] and rows[0]["budget"] is None
    assert run("verify", "--policy", "attention-gate:gate=gate.safetensors,decode=true").status == 0


def test_the_first_lines_work_with_the_bundled_gate(run: Run) -> None:
    Path("prompt.txt").write_text("Call me Ishmael. Some years ago, never mind how long precisely")
    assert run("trace", "--model", "demo", "prompt.txt", "--max-new-tokens", "6", "-q").status == 0
    done = run("replay", "--policy", "attention-gate", "--json")
    assert done.status == 0, done.err
    (row,) = json.loads(done.out)["runs"]
    assert row["metrics"]["held_keys"]["mean"] is None or row["metrics"]["held_keys"]["mean"] < 40


def test_json_has_every_look(run: Run, model: Path) -> None:
    done = run("gate", "train", "--model", model, "--text", "words.txt", "--json", "-o", "g", *QUICK)
    found = json.loads(done.out)
    assert found["file"] == "g" and [look["step"] for look in found["log"]] == [0, 3, 6]
    assert found["facts"]["provenance"]["eviction"] == "square"
    assert load_gate("g").facts.size == 4


def test_distilling(run: Run, model: Path) -> None:
    for number in range(2):
        Path(f"p{number}.txt").write_text(" ".join(f"w{word + number}" for word in range(1, 12)))
    given = ("--max-new-tokens", "4", "--hidden", "-q", "-o", "recorded")
    assert run("trace", "--model", model, "p0.txt", "p1.txt", *given).status == 0
    done = run("gate", "train", "--distill", "recorded", "--target-keep", "0.3", "--form", "bidirectional", *QUICK)
    assert done.status == 0, done.err
    assert load_gate("gate.safetensors").facts.form == "bidirectional"


@pytest.mark.parametrize(
    ("arguments", "said", "status"),
    [
        ((), "neither texts nor traces", 2),
        (("--text", "words.txt"), "--text needs a model", 2),
        (("--model", "MODEL", "--text", "words.txt", "--distill", "t"), "both texts and traces", 2),
        (("--model", "MODEL", "--text", "nowhere.txt"), "cannot read nowhere.txt", 2),
        (("--model", "MODEL", "--text", "words.txt", "--target-keep", "50"), "50.0 is not a share", 2),
        (("--model", "MODEL", "--text", "words.txt", "--resume"), "no checkpoint gate.safetensors.checkpoint", 2),
        (("--model", "MODEL", "--text", "words.txt", "-o", "no/where"), "cannot be written", 2),
        (("--model", "MODEL", "--text", "words.txt", "-o", "words.txt"), "words.txt exists", 1),
        (("--distill", "nothing"), "no trace nothing", 1),
    ],
)
def test_mistakes(arguments: tuple[str, ...], said: str, status: int, run: Run, model: Path) -> None:
    done = run("gate", "train", *(str(model) if part == "MODEL" else part for part in arguments), *QUICK)
    what, _ = done.two_lines()
    assert said in what and done.status == status
    assert not Path("gate.safetensors").exists()


def test_a_gate_that_is_not_there(run: Run, small: Path) -> None:
    done = run("replay", "--policy", "attention-gate:gate=nowhere.safetensors")
    assert "layer inputs" in done.two_lines()[0], "the trace is looked at first"
    Path("a.txt").write_text("word " * 60)
    done = run("perplexity", "a.txt", "--model", "demo", "--policy", "attention-gate:gate=nowhere.safetensors")
    what, todo = done.two_lines()
    assert what.startswith("no gate nowhere.safetensors") and "kvscope gate train" in todo
    assert done.status == 2 and not Path("reports").exists()

"""``kvscope gate scorers``, and a replay with its file."""

import json
from pathlib import Path

from kvscope.gates.scorers import load_scorers
from tests.cli.conftest import Run

EXAMPLE = str(Path(__file__).parents[2] / "traces" / "example")


def test_scorers_are_trained_and_replayed(run: Run) -> None:
    for name in ("a", "b"):
        Path(f"{name}.txt").write_text(f"The {name} of it all, and what became of the whale. " * 3)
    options = ["--hidden", "--reread", "--max-new-tokens", "4", "-o", "t"]
    assert run("trace", "--model", "demo", "a.txt", "b.txt", *options).status == 0
    made = run("gate", "scorers", "t", "--width", "4", "-o", "s.safetensors", "--json")
    facts = json.loads(made.out)
    assert made.status == 0 and len(facts["rank"]) == 4 == facts["width"] and facts["prompts"] == 2
    assert load_scorers("s.safetensors").facts.provenance["rank"] == facts["rank"]
    done = run("replay", "t", "--policy", "kvzap:scorers=s.safetensors", "--policy", "kvzap", "--json")
    one, demo = json.loads(done.out)["runs"]
    assert done.status == 0 and one["metrics"] != demo["metrics"]
    shown = run("gate", "scorers", "t", "--width", "0", "-o", "linear.safetensors")
    assert "linear" in shown.out and "kvzap:scorers=linear.safetensors" in shown.out + shown.err


def test_mistakes(run: Run) -> None:
    assert "no trace" in run("gate", "scorers", "nowhere").two_lines()[0]
    what, todo = run("gate", "scorers", EXAMPLE).two_lines()
    assert "second readings" in what and "--reread" in todo
    Path("s.safetensors").write_text("mine")
    assert run("gate", "scorers", EXAMPLE, "-o", "s.safetensors").status != 0
    assert Path("s.safetensors").read_text() == "mine"

"""``kvscope gate filters`` and a replay with its file."""

import json
from pathlib import Path

from kvscope.gates.filters import load_filters
from tests.cli.conftest import Run

EXAMPLE = str(Path(__file__).parents[2] / "traces" / "example")


def test_filters_are_made_and_replayed(run: Run) -> None:
    made = run("gate", "filters", EXAMPLE, "-o", "f.safetensors", "--json")
    assert (
        made.status == 0
        and json.loads(made.out)["queries"] == load_filters("f.safetensors").facts.provenance["queries"]
    )
    done = run("replay", EXAMPLE, "--policy", "q-filters:filters=f.safetensors", "--policy", "q-filters", "--json")
    first, second = json.loads(done.out)["runs"]
    assert first["metrics"] == second["metrics"], "the bundled filters are those of the example"


def test_mistakes(run: Run) -> None:
    assert "no trace" in run("gate", "filters", "nowhere").two_lines()[0]
    Path("f.safetensors").write_text("mine")
    assert run("gate", "filters", EXAMPLE, "-o", "f.safetensors").status != 0
    assert Path("f.safetensors").read_text() == "mine"
    what, todo = run("replay", EXAMPLE, "--policy", "q-filters:filters=nowhere").two_lines()
    assert what.startswith("no filters nowhere") and "kvscope gate filters" in todo

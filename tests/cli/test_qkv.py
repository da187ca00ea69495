"""A trace of vectors alone, through every command that reads a trace."""

import json
from pathlib import Path

from tests.cli.conftest import Run

TEXT = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: "
    "once or twice she had peeped into the book her sister was reading, but it had no pictures."
)
STORE = ("--store", "qkv", "--prefill-chunk", "16", "--max-new-tokens", "24")


def test_trace_info_replay_report(run: Run) -> None:
    Path("prompt.txt").write_text(TEXT)
    done = run("trace", "--model", "demo", "prompt.txt", *STORE)
    assert done.status == 0, done.err
    assert "16 tokens at a time" in done.err
    assert "maps+vectors: " in done.err, "what the other stores would take is said"
    assert {path.name for path in Path("traces/prompt-demo").iterdir()} == {
        "trace.json",
        "tokens.parquet",
        "states",
        "hidden",  # since a gate comes with the bundled model
    }

    told = json.loads(run("info", "--json").out)
    assert told["store"] == "qkv"
    assert told["stored"] == ["hidden", "vectors:keys", "vectors:queries", "vectors:values"]
    assert {"maps", "similarity", "value_l1"} <= set(told["derived"])
    table = run("info").out
    assert "qkv" in table
    assert "recomputed" in table

    policies = [part for name in ("a2sf", "vatp", "keydiff", "key-norm", "quest") for part in ("--policy", name)]
    done = run("replay", *policies, "--budget", "40%", "-o", "mine")
    assert done.status == 0, done.err
    summary = json.loads(Path("reports/mine/summary.json").read_text())
    assert {row["policy"] for row in summary["runs"]} == {"a2sf", "vatp", "keydiff", "key-norm", "quest"}

    done = run("report", "mine")
    assert done.status == 0, done.err
    assert Path("reports/mine.html").stat().st_size > 10_000
    assert run("info", "--verify", "-q").status == 0


def test_a_trace_without_its_states_says_so(run: Run) -> None:
    Path("prompt.txt").write_text(TEXT)
    assert run("trace", "--model", "demo", "prompt.txt", *STORE, "-q").status == 0
    Path("traces/prompt-demo/states/layer=000.parquet").unlink()
    done = run("replay", "--policy", "a2sf")
    assert done.status == 1
    what, _ = done.two_lines()
    assert "states/layer=000.parquet: it is missing" in what

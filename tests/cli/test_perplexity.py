"""The closed loop from the command line: on a trace, and straight from text."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kvscope.results.store import open_replay
from tests.cli.conftest import Run
from tests.model.tiny import saved

WORDS = " ".join(f"w{(7 * index * index + 3 * index) % 61 + 1}" for index in range(150))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(tmp_path / "tiny")


def test_replay_with_perplexity(run: Run, model: Path) -> None:
    Path("p.txt").write_text(" ".join(WORDS.split()[:24]))
    assert run("trace", "--model", model, "p.txt", "--max-new-tokens", "12", "-o", "t", "-q").status == 0
    done = run("replay", "-p", "h2o", "-p", "tova", "-b", "6,36", "--perplexity", "-o", "r", "--json")
    assert done.status == 0, done.err
    rows = {row["run"]: row for row in json.loads(done.out)["runs"]}
    assert [row["loop"] for row in rows.values()] == ["open"] * 4 + ["closed"] * 4
    for number in range(4, 8):
        row = rows[number]
        assert row["open_run"] == number - 4 and row["positions"] == "original"
        assert row["label"] == rows[number - 4]["label"] and row["budget"] == rows[number - 4]["budget"]
        metrics = row["metrics"]
        assert metrics["perplexity"]["count"] == 12
        assert metrics["perplexity_ratio"]["mean"] == pytest.approx(
            metrics["perplexity"]["mean"] / metrics["perplexity_full"]["mean"]
        )
        assert 0 < row["gap"]["held_overlap"] <= 1
    whole = [row for row in rows.values() if row["loop"] == "closed" and row["budget"] == "36"]
    assert [row["gap"]["held_overlap"] for row in whole] == [1, 1]
    replay = open_replay("reports/r", verify=True)
    tokens = replay.tokens(run=4)
    assert list(tokens["position"]) == list(range(24, 36))
    assert np.exp(tokens["nll_policy"].mean()) == pytest.approx(rows[4]["metrics"]["perplexity"]["mean"], rel=1e-5)
    assert replay.info.loop == "open and closed"
    table = run("replay", "-p", "h2o", "-b", "6", "--perplexity", "-o", "again").out
    assert (
        "perplexity" in table
        and "closed" in table
        and "Overlap of the keys held" in table
        and "looks too good" in table
    )


def test_bounds_go_along_in_the_open_loop(run: Run, model: Path) -> None:
    """What they look ahead at depends on what they evict, but how close the others come to them is wanted there too."""
    Path("p.txt").write_text(" ".join(WORDS.split()[:24]))
    assert run("trace", "--model", model, "p.txt", "--max-new-tokens", "12", "-o", "t", "-q").status == 0
    done = run("replay", "-p", "belady", "-p", "h2o", "-b", "6", "--perplexity", "-o", "r", "--json", "-q")
    assert done.status == 0, done.err
    rows = json.loads(done.out)["runs"]
    assert [(row["label"], row["loop"], row.get("open_run")) for row in rows] == [
        ("belady", "open", None),
        ("h2o", "open", None),
        ("h2o", "closed", 1),
    ]
    shares = [row["bounds"]["share_of_belady"] for row in rows]
    assert shares[0] == 1 and 0 < shares[1] < 1 and shares[2] is None
    alone = run("replay", "-p", "belady", "-b", "6", "--perplexity", "-o", "none")
    assert alone.status == 2 and "needs future attention" in alone.two_lines()[0]


def test_the_full_cache_has_the_perplexity_of_the_trace(run: Run, model: Path) -> None:
    from kvscope.trace.reader import open_trace

    Path("p.txt").write_text(" ".join(WORDS.split()[:20]))
    Path("c.txt").write_text(" " + " ".join(WORDS.split()[20:50]))
    assert run("trace", "--model", model, "p.txt", "--continuation", "c.txt", "-o", "t", "-q").status == 0
    done = run("replay", "-p", "full", "-p", "window", "--perplexity", "--json", "-q")
    rows = [row for row in json.loads(done.out)["runs"] if row["loop"] == "closed"]
    logprob = open_trace("traces/t").tokens(0)["logprob"].to_numpy()[20:]
    assert rows[0]["metrics"]["perplexity"]["mean"] == pytest.approx(np.exp(-logprob.mean()), rel=1e-6)
    assert rows[0]["metrics"]["top1_agreement"]["mean"] == 1
    assert rows[1]["metrics"]["perplexity_ratio"]["mean"] != 1


def test_perplexity_of_text(run: Run, model: Path) -> None:
    Path("book.txt").write_text(WORDS)
    flags = ["-p", "a2sf", "-p", "full", "--alpha", "0.5", "-b", "8", "--window", "48"]
    done = run("perplexity", "--model", model, "book.txt", *flags, "-o", "r", "--json")
    assert done.status == 0, done.err
    told = json.loads(done.out)
    a2sf, full = told["runs"]
    assert a2sf["params"]["alpha"] == 0.5 and a2sf["loop"] == "closed" and a2sf["prefill"] == "stream"
    assert a2sf["metrics"]["perplexity"]["count"] == 3 * 47  # the last six tokens are too few for a window
    assert [one["length"] for one in told["trace"]["sequences"]] == [48, 48, 48]
    assert full["metrics"]["perplexity"]["mean"] == pytest.approx(full["metrics"]["perplexity_full"]["mean"], rel=1e-6)
    about = json.loads(Path("reports/r/run.json").read_text())["trace"]
    assert about["protocol"] == "text" and about["window"] == 48 and about["texts"][0]["file"] == "book.txt"


def test_the_full_cache_on_text_is_plain_transformers(run: Run, model: Path) -> None:
    from transformers import AutoModelForCausalLM

    Path("book.txt").write_text(" ".join(WORDS.split()[:60]))
    done = run("perplexity", "--model", model, "book.txt", "-p", "full", "--json", "-q")
    assert done.status == 0, done.err
    found = json.loads(done.out)["runs"][0]["metrics"]["perplexity"]["mean"]
    ids = torch.tensor([[int(word[1:]) for word in WORDS.split()[:60]]])
    with torch.inference_mode():
        loss = AutoModelForCausalLM.from_pretrained(model)(input_ids=ids, labels=ids).loss
    assert found == pytest.approx(float(loss.exp()), rel=1e-6)


@pytest.mark.parametrize(
    ("words", "status", "what"),
    [
        (["book.txt", "-p", "ideal"], 2, "ideal"),
        (["book.txt", "-p", "tova", "--window", "100"], 2, "more than the model's context of 64"),
        (["book.txt", "-p", "tova", "--window", "20", "--prompt-length", "20"], 2, "fills a window"),
        (["short.txt", "-p", "tova"], 2, "too few tokens"),
        (["nothing.txt", "-p", "tova"], 2, "cannot read nothing.txt"),
        (["book.txt"], 2, "no policy is given"),
        (["book.txt", "-p", "tova", "--alhpa", "1"], 2, "--alhpa"),
        (["book.txt", "-p", "snapkv"], 2, "snapkv is not defined for stream prefill"),
        (["book.txt", "-p", "streaming-llm", "-b", "3"], 2, "protects 4 first"),
        (["book.txt", "-p", "quest", "--positions", "compacted"], 2, "nothing to compact"),
    ],
)
def test_what_is_refused(run: Run, model: Path, words: list[str], status: int, what: str) -> None:
    Path("book.txt").write_text(WORDS)
    Path("short.txt").write_text("w1 w2")
    done = run("perplexity", "--model", model, *words)
    assert done.status == status
    assert what in done.two_lines()[0]
    assert not list(Path().glob("reports/*"))


def test_a_prompt_is_read_with_the_full_cache(run: Run, model: Path) -> None:
    Path("book.txt").write_text(WORDS)
    flags = ["--window", "50", "--prompt-length", "20", "--max-windows", "2"]
    done = run("perplexity", "--model", model, "book.txt", "-p", "snapkv:window=4", "-b", "30%", *flags, "--json", "-q")
    assert done.status == 0, done.err
    (row,) = json.loads(done.out)["runs"]
    assert row["prefill"] == "full" and row["budget_keys"] == 6 and row["metrics"]["perplexity"]["count"] == 60


def test_an_imported_trace_has_no_model(run: Run, small: Path) -> None:
    done = run("replay", "-p", "tova", "--perplexity")
    assert done.status == 1
    assert "was imported and has no model" in done.two_lines()[0]


def test_options_of_the_closed_loop_alone(run: Run, small: Path) -> None:
    done = run("replay", "-p", "tova", "--positions", "compacted")
    assert done.status == 2
    assert "--perplexity" in done.two_lines()[1]


def test_verify(run: Run, model: Path) -> None:
    Path("p.txt").write_text(" ".join(WORDS.split()[:14]))
    Path("c.txt").write_text(" ".join(WORDS.split()[14:22]))
    assert run("trace", "--model", model, "p.txt", "--continuation", "c.txt", "-q").status == 0
    done = run("verify", "-p", "a2sf", "-p", "tova", "--alpha", "0.5", "-b", "5", "--tokens", "6")
    assert done.status == 0, done.err
    assert "equal" in done.out and "a2sf" in done.out
    told = json.loads(run("verify", "-p", "h2o", "-b", "5,50%", "--json", "-q").out)
    assert told["agrees"] and [row["keys"] for row in told["verdicts"]] == [5, 7]
    assert {row["tokens"] for row in told["verdicts"]} == {8} and all(row["decided"] for row in told["verdicts"])
    assert all(row["largest_cache"] <= row["keys"] for row in told["verdicts"])
    refused = run("verify", "-p", "quest")
    assert refused.status == 2 and "keys that a smaller cache does not hold" in refused.two_lines()[0]


def test_verify_tells_a_difference_by_its_status(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("p.txt").write_text(" ".join(WORDS.split()[:14]))
    assert run("trace", "--model", model, "p.txt", "--max-new-tokens", "8", "-q").status == 0
    monkeypatch.setattr("kvscope.closed_loop.verify.Verdict.tolerance", -1.0)
    done = run("verify", "-p", "tova", "-b", "5")
    assert done.status == 3
    assert "same keys, other logits" in done.out


def test_some_heads_alone_have_no_closed_loop(run: Run, model: Path) -> None:
    Path("p.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8")
    part = ("--heads", "0-1", "--max-new-tokens", "4", "-o", "part", "-q")
    assert run("trace", "--model", model, "p.txt", *part).status == 0
    done = run("replay", "-p", "h2o", "-b", "6", "--perplexity")
    assert done.status == 2 or done.status == 1
    assert "holds 2 of 4 query heads" in done.err and "without --heads" in done.err


def test_tokens_that_are_not_scored_are_named(run: Run, model: Path) -> None:
    Path("book.txt").write_text(" ".join(f"w{index % 60 + 1}" for index in range(112)))
    flags = ["-p", "h2o", "-b", "8", "--window", "53", "-o", "r", "-q"]
    done = run("perplexity", "--model", model, "book.txt", *flags)
    assert done.status == 0, done.err
    assert "book.txt: its last 6 tokens are not scored" in done.err
    assert json.loads(Path("reports/r/run.json").read_text())["trace"]["texts"][0]["dropped"] == 6

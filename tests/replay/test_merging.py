"""Replays with merging: the closed loop alone has it, and results say which runs merged."""

from __future__ import annotations

from pathlib import Path

import pytest

import kvscope
from kvscope.core.errors import UsageError
from kvscope.core.options import ClosedLoopOptions, GenerateOptions
from kvscope.results.diff import diff
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace, open_trace

EXAMPLE = Path(__file__).parents[2] / "traces" / "example"


@pytest.fixture(scope="module")
def example() -> Trace:
    return open_trace(EXAMPLE)


@pytest.fixture(scope="module")
def made(example: Trace, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    folder = tmp_path_factory.mktemp("replays") / "merged"
    policies = ["tova", "belady", "full"]
    return kvscope.replay(
        example, policies, "20%", merge="none,cam(seed=3),d2o", closed=ClosedLoopOptions(), output=folder
    )


def test_labels_and_records_name_the_rule(made: Replay) -> None:
    closed = [(run.label, run.merge, run.open_run) for run in made.info.runs if run.loop == "closed"]
    assert closed == [
        ("tova", None, 0),
        ("tova + cam(seed=3)", "cam(tokens=16,chance=mean,seed=3)", None),
        ("tova + d2o", "d2o(beta=0.5)", None),
        ("full", None, 2),
        ("full + cam(seed=3)", "cam(tokens=16,chance=mean,seed=3)", None),
        ("full + d2o", "d2o(beta=0.5)", None),
    ]
    assert [run.label for run in made.info.runs if run.loop == "open"] == ["tova", "belady", "full"]


def test_rules_change_what_follows_an_eviction(made: Replay) -> None:
    """Nothing is evicted by `full`, so nothing is merged; with `tova` every rule gives its own perplexity."""
    closed = {run.label: run.mean("perplexity") for run in made.summary.runs if run.loop == "closed"}
    for label in ("full + cam(seed=3)", "full + d2o"):
        assert closed[label] == pytest.approx(closed["full"], rel=1e-6)
    assert len({closed[name] for name in ("tova", "tova + cam(seed=3)", "tova + d2o")}) == 3


def test_runs_without_merging_are_unchanged_beside_others(example: Trace, made: Replay, tmp_path: Path) -> None:
    alone = kvscope.replay(example, "tova", "20%", closed=ClosedLoopOptions(), output=tmp_path / "alone")
    run = next(each for each in alone.summary.runs if each.loop == "closed")
    other = next(each for each in made.summary.runs if (each.loop, each.label) == ("closed", "tova"))
    assert run.decisions == other.decisions
    assert all(other.metrics[name] == value for name, value in run.metrics.items())


def test_runs_with_other_rules_are_not_compared(example: Trace, tmp_path: Path) -> None:
    """`tova` with each rule has one policy, budget and parameters: they are two runs all the same."""
    one, other = (
        kvscope.replay(example, "tova", "20%", merge=f"none,{rule}", closed=ClosedLoopOptions(), output=tmp_path / rule)
        for rule in ("cam", "d2o")
    )
    verdicts: dict[str, set[str]] = {}
    for row in diff(one.summary, other.summary).rows:
        verdicts.setdefault(row.run.split(" 20%")[0], set()).add(row.verdict)
    assert verdicts["tova + cam"] == {"missing"} and verdicts["tova + d2o"] == {"new"}
    assert not verdicts["tova"] & {"missing", "new"}


def test_the_open_loop_refuses(example: Trace) -> None:
    with pytest.raises(UsageError, match=r"d2o cannot be replayed in the open loop: .*\n.*--perplexity"):
        kvscope.replay(example, "tova", "20%", merge="none,d2o")


@pytest.mark.parametrize(("cache", "policy", "why"), [("int4", "tova", "int4:kivi"), ((), "quest", "holds every key")])
def test_what_cannot_be_merged_is_named(example: Trace, cache: str, policy: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        kvscope.replay(example, policy, "20%", merge="d2o", cache=cache, closed=ClosedLoopOptions())


def test_answers_are_said_with_the_merged_cache(tmp_path: Path) -> None:
    """Each rule decodes to its own text: 20 tokens after an eviction at the end of the prompt."""
    prompt = tmp_path / "prompts.jsonl"
    words = "The old house stood by the river. The garden was full of apple trees, and the children played there. "
    prompt.write_text('{"prompt": "' + words * 3 + '", "answers": ["x"]}\n')
    trace = kvscope.trace("demo", [prompt], output=tmp_path / "trace", max_new_tokens=20)
    replay = kvscope.replay(
        trace,
        "h2o",
        "20%",
        merge="none,cam,d2o,kvmerger(threshold=0.5)",
        closed=ClosedLoopOptions(),
        generate=GenerateOptions(),
        output=tmp_path / "r",
    )
    texts = replay.frame("answers")["text"].to_list()
    assert len(texts) == 4 and len(set(texts)) >= 3

"""Answers under a policy: what is generated with evicted keys removed says what the closed loop foresees."""

import json
from pathlib import Path

import pytest

import kvscope
from kvscope.core.options import ClosedLoopOptions, GenerateOptions, OutputOptions, Prefill, ReplayOptions
from kvscope.replay.compile import compile_replay
from kvscope.results.store import Replay
from kvscope.tasks import make_examples, parse_task
from kvscope.tasks.dataset import as_lines
from kvscope.tasks.make import Lengths, words
from kvscope.trace.reader import Trace

POLICIES = ["full", "window", "h2o", "tova", "a2sf", "snapkv:window=8"]
NEW = 5


def needles(folder: Path, metric: str = "exact", number: int = 3) -> Path:
    """Write needles at several depths, in the wording that the bundled model understands."""
    family = parse_task("needle:wording=notes")
    lines = []
    for length in (40, 80):
        for example in make_examples(family, Lengths(length, words, "words"), number, seed=3):
            lines.append({**json.loads(as_lines([example])), "metric": metric})
    file = folder / "needles.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp("traces")
    return kvscope.trace("demo", [needles(folder)], output=folder / "t", max_new_tokens=NEW, dtype="float64")


def replayed(trace: Trace, path: Path, policies: list[str], **options: object) -> Replay:
    given = {"closed": ClosedLoopOptions(dtype="float64"), "generate": GenerateOptions(), **options}
    job = compile_replay(trace, policies, "20%,50%", ReplayOptions(**given))  # type: ignore[arg-type]
    return job.execute(OutputOptions(path))


def both(replay: Replay) -> dict[tuple[int, int], tuple[float, float]]:
    """Return score and all-tokens-first-choice of every closed run and example that have both."""
    from kvscope.results.stream import by_sequence

    runs = [run.run for run in replay.info.runs if run.loop == "closed"]
    found = by_sequence(replay, runs, ["answer_score", "answer_first"])
    return {
        (run, sequence): (found[run, "answer_score"][sequence], first)
        for run in runs
        for sequence, first in found[run, "answer_first"].items()
    }


@pytest.mark.parametrize("prefill", list(Prefill))
def test_generated_answers_are_those_of_the_closed_loop(trace: Trace, prefill: Prefill, tmp_path: Path) -> None:
    policies = POLICIES if prefill == Prefill.full else POLICIES[:3]  # every token of a prompt is decoded
    found = both(replayed(trace, tmp_path / "r", policies, prefill=prefill))
    assert len(found) == (2 * len(policies) - 1) * 6, "every example has both: the model answers all with a full cache"
    assert set(found.values()) == {(0.0, 0.0), (1.0, 1.0)}, "equal, and some right and some wrong"

"""Where memory does not suffice for all runs at once, fewer are computed at a time, and the results are the same.

Prevents results that are written twice or half, and a traceback where the batch was only too large.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from kvscope.closed_loop.compile import compile_perplexity
from kvscope.closed_loop.forward import ClosedLoop
from kvscope.core.errors import ResultError
from kvscope.core.memory import OutOfMemory, is_out_of_memory
from kvscope.core.options import ModelSource, OutputOptions
from kvscope.engine.parts import RunParts
from kvscope.engine.scoring import BlockScorer
from kvscope.replay.layer_group import LayerGroup, PlanRuns
from kvscope.replay.rescore import rescore
from kvscope.replay.run import replay
from kvscope.results.store import Replay, open_replay
from kvscope.trace.reader import Trace, open_trace

ROOT = Path(__file__).parents[2]
POLICIES = ["h2o", "quest", "belady", "pyramidkv"]
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has 1 GiB free.")


@pytest.fixture(scope="module")
def example() -> Trace:
    return open_trace(ROOT / "traces" / "example")


def failing(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, calls: set[int], error: Exception = FULL) -> None:
    """Let some calls of a method fail, counted from 0."""
    method, count = getattr(owner, name), [0]

    def called(*arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] - 1 in calls:
            raise error
        return method(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


def contents(made: Replay) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in made.path.iterdir() if file.name != "run.json"}


def equal(one: Replay, other: Replay) -> bool:
    return contents(one) == contents(other) and one.info.runs == other.info.runs


def replayed(trace: Trace, output: Path) -> Replay:
    return replay(trace, POLICIES, "20%,40%,60%", output=output)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "calls"),
    [
        (LayerGroup, "__init__", {0}),
        (LayerGroup, "score", {0, 1, 2}),  # 12 runs, then 6, 3, 1 at a time
        (LayerGroup, "check", {0}),
        (PlanRuns, "count", {2, 5}),  # after the results of some runs of the part
    ],
)
def test_open_loop(
    owner: type, name: str, calls: set[int], example: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replayed(example, tmp_path / "whole")
    failing(monkeypatch, owner, name, calls)
    assert equal(replayed(example, tmp_path / "parts"), whole)


def test_rescoring(example: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = replay(example, ["h2o", "tova"], "20%", output=tmp_path / "made", metrics=["retained_mass"])
    whole = rescore(made, example, ["ideal_mass"], output=tmp_path / "whole")
    failing(monkeypatch, BlockScorer, "add", {0})
    assert contents(rescore(made, example, ["ideal_mass"], output=tmp_path / "parts")) == contents(whole)


def measured(text: Path, output: Path) -> Replay:
    job = compile_perplexity(ModelSource("demo", dtype="float64"), [text], ["h2o", "tova"], "20%,40%")
    return job.execute(OutputOptions(output))


@pytest.mark.parametrize("calls", [{2}, {2, 5}])
def test_closed_loop(calls: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "traces" / "example.txt").read_text(encoding="utf-8")[:400])
    whole = measured(text, tmp_path / "whole")
    job = compile_perplexity(ModelSource("demo", dtype="float64"), [text], ["h2o", "tova"], "20%,40%")
    failing(monkeypatch, ClosedLoop, "_attend", calls)
    parts = job.execute(OutputOptions(tmp_path / "parts"))
    residency, tokens = (contents(parts)[name] for name in ("residency.parquet", "tokens.parquet"))
    assert residency == contents(whole)["residency.parquet"]
    assert len(tokens) == len(contents(whole)["tokens.parquet"])
    for one, other in zip(parts.summary.runs, whole.summary.runs, strict=True):
        assert one.metrics.keys() == other.metrics.keys()
        for name, value in other.metrics.items():
            assert one.metrics[name].mean == pytest.approx(value.mean, abs=1e-6, nan_ok=True)


def test_one_run_that_does_not_fit_is_an_error_and_leaves_nothing_whole(
    example: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, PlanRuns, "count", set(range(3, 1000)))
    with pytest.raises(OutOfMemory) as caught:
        replayed(example, tmp_path / "replay")
    assert caught.value.what == "out of memory with one run at a time: CUDA out of memory"
    assert "--device cpu" in caught.value.todo
    assert not (tmp_path / "replay").exists()
    with pytest.raises(ResultError):
        open_replay(tmp_path / "replay.incomplete")


def test_replacing_keeps_the_old_one_if_memory_is_exceeded(
    example: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(replay(example, ["h2o"], "20%", output=tmp_path / "replay"))
    failing(monkeypatch, LayerGroup, "score", set(range(1000)), pa.ArrowMemoryError("malloc of size 64 failed"))
    with pytest.raises(OutOfMemory):
        replay(example, ["h2o"], "20%", output=tmp_path / "replay", force=True)
    assert contents(open_replay(tmp_path / "replay")) == before


def test_parts_are_halved_and_a_size_that_failed_is_not_tried_again() -> None:
    parts, sizes = RunParts(), []

    def work(part: list[int]) -> list[int]:
        sizes.append(len(part))
        if len(part) > 3:
            raise MemoryError
        return [2 * run for run in part]

    assert list(parts.results(range(8), work)) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert list(parts.results(range(3), work)) == [0, 2, 4]
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 1]


def test_errors_of_the_writer_and_other_errors_are_not_retried() -> None:
    calls = []

    def work(part: list[int]) -> list[int]:
        calls.append(part)
        return part

    def written() -> None:
        for _ in RunParts().results(range(4), work):
            raise MemoryError  # in the sink: some of a run may have been written

    with pytest.raises(MemoryError):
        written()
    assert len(calls) == 1

    def wrong(part: list[int]) -> list[int]:
        calls.append(part)
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(RunParts().results(range(4), wrong))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("error", "exceeded"),
    [
        (FULL, True),
        (MemoryError(), True),
        (pa.ArrowMemoryError("malloc of size 64 failed"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("shapes differ"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, exceeded: bool) -> None:
    assert is_out_of_memory(error) is exceeded


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory"), FULL])
def test_any_command_ends_in_two_lines(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kvscope.cli import app

    def exceeded(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(app, "program", lambda words: exceeded)
    assert app.run(["info"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 2 and "out of memory" in lines[0] and "--device cpu" in lines[1]

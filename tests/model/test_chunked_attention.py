"""Layers that attend in chunks (Llama 4): a query sees the earlier keys of its chunk, in engine and decoder alike."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kvscope.closed_loop.compile import compile_verify
from kvscope.core.options import ClosedLoopOptions, ModelSource, OutputOptions, ReplayOptions, VerifyOptions
from kvscope.core.recording_options import TextOptions
from kvscope.engine.cache_state import CacheState
from kvscope.engine.rows import Shape
from kvscope.engine.simulation import CacheSimulation
from kvscope.model.compile import compile_recording
from kvscope.policies.spec import parse_policy
from kvscope.replay.compile import compile_replay
from kvscope.trace.reader import Trace
from tests.models.build import saved

CHUNK, LENGTH = 4, 15
PROMPT = " ".join(f"w{(7 * number) % 101 + 3}" for number in range(20))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    folder = tmp_path_factory.mktemp("llama4")
    (folder / "prompt.txt").write_text(PROMPT)
    model = ModelSource(str(saved(folder / "model", "llama4_text")))
    text, output = TextOptions(max_new_tokens=10), OutputOptions(folder / "trace")
    return compile_recording(model, [folder / "prompt.txt"], output, text=text).execute()


def test_a_trace_says_which_layers_attend_in_chunks(trace: Trace) -> None:
    assert trace.header.layer_types == ["chunked", "chunked", "full"]
    assert trace.header.chunk_size == [8, 8, None]
    for t in range(trace.sequences[0].length):
        row = trace.attention(0, 0, t, t + 1)[:, 0]
        assert not row[:, : t // 8 * 8].any() and np.allclose(row[:, t // 8 * 8 :].sum(-1), 1, atol=2e-3)


def chunked(layers: int) -> Shape:
    return Shape(tuple(range(layers)), 2, 1, 3, LENGTH, chunks=(CHUNK, None)[:layers])


@pytest.mark.parametrize("start", range(LENGTH))
def test_a_block_of_keys_is_appended_as_one_by_one(start: int) -> None:
    budget, protected = torch.full((1, 2, 1), LENGTH), torch.zeros(1, 2, dtype=torch.int64)
    one, block = (CacheState.empty(chunked(2), budget, protected, "cpu", torch.float32) for _ in range(2))
    for t in range(LENGTH):
        one.append(t)
    block.append_block(0, start)
    block.append_block(start, LENGTH)
    for name in ("alive", "leave", "n_alive"):
        assert torch.equal(getattr(one, name), getattr(block, name)), name
    t = torch.arange(LENGTH)
    assert torch.equal(one.visible(0, LENGTH)[0, 0, 0], (t <= t[:, None]) & (t >= t[:, None] // CHUNK * CHUNK))
    assert torch.equal(one.visible(0, LENGTH)[0, 1, 0], t <= t[:, None])


@pytest.mark.parametrize("spec", ["h2o", "tova", "window", "streaming-llm:sinks=1", "full"])
@pytest.mark.parametrize("budget", [2, 3, 9])
def test_no_policy_holds_more_than_a_chunk(spec: str, budget: int) -> None:
    shape, rows = chunked(1), torch.rand(1, 2, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))
    simulation = CacheSimulation(parse_policy(spec), [budget], shape, "stream", {})
    for t in range(LENGTH):
        row = rows[:, :, t, : t + 1].clone()
        row[..., : t // CHUNK * CHUNK] = 0
        simulation.step(t, row / row.sum(-1, keepdim=True))
    simulation.check()
    visible = simulation.visible(0, LENGTH)[0, 0, 0]
    t = torch.arange(LENGTH)
    assert not (visible & (t < t[:, None] // CHUNK * CHUNK)).any(), "keys of an earlier chunk have left"
    counts = [int(row.sum()) for row in visible]
    limit = CHUNK if spec == "full" else min(CHUNK, budget + 1)
    assert counts == [min(step % CHUNK + 1, limit) for step in range(LENGTH)]


@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_decoding_equals_the_closed_loop(trace: Trace, prefill: str) -> None:
    """Budgets below and above the chunk; the tolerance is that of the experts, which compute in float32."""
    options = VerifyOptions(prefill=prefill)
    for budget in ("4", "12"):
        verdicts = compile_verify(trace, ["h2o", "tova", "streaming-llm:sinks=1"], budget, options).execute()
        assert all(one.agrees and not one.different for one in verdicts), verdicts


def test_both_loops_evict_within_chunks(trace: Trace, tmp_path: Path) -> None:
    options = ReplayOptions(closed=ClosedLoopOptions())
    made = compile_replay(trace, ["h2o", "belady", "ideal"], "4", options).execute(OutputOptions(tmp_path / "replay"))
    step, key = np.arange(trace.sequences[0].length)[:, None], np.arange(trace.sequences[0].length)
    for run in made.info.runs:
        visible = made.visible(run.run, 0, 0)
        assert not (visible & (key < step // 8 * 8)).any(), run.policy
        if not run.reads:
            assert (visible[:, 20:].sum(-1) <= 5).all(), run.policy

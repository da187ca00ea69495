"""KVzip against its plain-loop reference, and the second reading that a trace records for it."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from kvscope.closed_loop.compile import compile_closed_loop, compile_perplexity, compile_verify
from kvscope.closed_loop.decode import attention_facts, decode
from kvscope.closed_loop.trace_passages import passages_of
from kvscope.closed_loop.verify import VerifyJob
from kvscope.core.budget import parse_budgets
from kvscope.core.errors import ModelError, TraceError, UsageError
from kvscope.core.options import ModelSource, OutputOptions, PerplexityOptions, Prefill, VerifyOptions
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.engine.runs import runs_of
from kvscope.model.attention_hook import Call, observe_attention
from kvscope.model.loading import load
from kvscope.model.second_reading import AGAIN, FROM_HERE, _require_whole, second_reading
from kvscope.policies.kvzip import KVzip
from kvscope.policies.spec import parse_policy
from kvscope.replay.compile import compile_replay
from tests.model.tiny import build, saved, tokens
from tests.policies.loops import BUDGET, PROMPT, recorded
from tests.policies.vectors import sets, simulated
from tests.reference.policies.kvzip import largest, retained

T, P = 30, 17


@pytest.mark.parametrize(("kv_heads", "phase", "sinks"), list(product([2, 4], ["prefill", "every:5"], [0, 4])))
def test_decisions_equal_the_plain_loop(kv_heads: int, phase: str, sinks: int) -> None:
    shape, budgets = Shape((0, 1), 4, kv_heads, P, T), [5, 9, T]
    scores = torch.rand(2, kv_heads, T, generator=torch.Generator().manual_seed(5), dtype=torch.float64).round(
        decimals=1
    )
    plan = EvictionPlan(KVzip(sinks=sinks), phase, "uniform")
    simulation, _ = simulated(plan, budgets, shape, "full", {"reconstruction": scores})
    for (run, budget), layer, head in product(enumerate(budgets), range(2), range(kv_heads)):
        held: set[int] = set()
        expected = []
        for t in range(T):
            held = held | {t}
            if plan.compresses(t, P, "full"):
                held = retained(scores[layer, head].tolist(), sorted(held), budget, P, sinks)
            expected.append(held)
        assert sets(simulation.held(0, T)[run, layer, head]) == expected


@pytest.mark.parametrize(("name", "chunk"), [("llama", 2048), ("llama", 7), ("qwen3", 9), ("gpt2", 2048)])
def test_the_second_reading_is_one_of_the_whole_model(name: str, chunk: int, tmp_path: Path) -> None:
    """From the calls of plain passes over prompt, instruction and chunk, with the weights in loops."""
    loaded = load(ModelSource(str(saved(tmp_path / "m", name)), dtype="float32"))
    prompt = tokens(20)[0].tolist()
    with torch.no_grad():
        found = second_reading(loaded, prompt, chunk)
        for start in range(0, 20, chunk):
            stop = min(start + chunk, 20)
            words = AGAIN if not start else FROM_HERE
            asked = loaded.tokenizer.encode(words, add_special_tokens=False) + (prompt[max(0, start - 8) : start])
            ids = [*prompt, *asked, *prompt[start:stop]]
            calls: list[Call] = []
            with observe_attention(loaded.model, calls.append):
                loaded.model(torch.tensor([ids]), use_cache=False)
            for call in calls:
                group = call.query.shape[1] // call.key.shape[1]
                for head in range(call.key.shape[1]):
                    expected = largest(
                        call.query[0, head * group : (head + 1) * group, 20:].numpy().astype(float),
                        call.key[0, head, :20].numpy().astype(float),
                        call.key[0, head, 20:].numpy().astype(float),
                        start,
                        stop,
                        call.scaling,
                    )
                    assert np.allclose(found[call.layer][head, start:stop].numpy(), expected, atol=1e-5)


def test_the_trace_has_it_and_both_loops_use_it(tmp_path: Path) -> None:
    made = recorded(tmp_path, store="maps", reread=True)
    loaded = load(ModelSource(str(tmp_path / "model"), dtype="float32"))
    ids = made.tokens(0)["token_id"].tolist()
    with torch.no_grad():
        found = second_reading(loaded, ids[:PROMPT])
    for layer in range(2):
        recorded_ones = made.key_numbers("reconstruction", 0, layer)
        assert np.allclose(recorded_ones[:, :PROMPT], found[layer].numpy(), atol=1e-6)
        assert not recorded_ones[:, PROMPT:].any() and recorded_ones[:, :PROMPT].min() > 0
    replay = compile_replay(made, ["kvzip:sinks=1"], BUDGET).execute(OutputOptions(tmp_path / "r", False, None))
    frame = replay.residency(0).sort_values(["layer", "kv_head", "key"])
    gone = frame["leave"].fillna(-1).to_numpy(int).reshape(2, 2, -1)[..., :PROMPT] == PROMPT - 1
    assert (gone.sum(-1) == PROMPT - BUDGET).all() and (gone != gone[:1, :1]).any()
    model = build("llama").double()
    (run,) = runs_of([EvictionPlan.published(parse_policy("kvzip:sinks=1"))], parse_budgets(str(BUDGET)), loop="closed")
    job = compile_closed_loop(model, passages_of(made, loaded), [run], [], Prefill.full)
    (verdict,) = VerifyJob(job, attention_facts(model, torch.tensor([ids]))).execute()
    assert verdict.decided and verdict.agrees and verdict.keys == BUDGET, verdict


def test_it_is_refused_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"needs reconstruction, .*\nRecord it again with --reread"):
        compile_replay(recorded(tmp_path), ["kvzip"], "50%")
    with pytest.raises(UsageError, match=r"kvzip needs a second reading .*\nUse kvscope perplexity, or .* --reread"):
        decode(build("llama"), tokens(12), EvictionPlan.published(KVzip()), 5, prompt=8)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_windows_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not attend to the whole prompt"):
        recorded(tmp_path, name, store="maps", reread=True)


@pytest.mark.parametrize("part", [{"sliding_window": 99}, {"chunk": 99}])
def test_a_window_that_is_not_full_yet_is_refused_too(part: dict[str, int]) -> None:
    states = torch.ones(1, 2, 9, 4)
    call = Call(0, states[:, :, :3], states, states, None, 0.5)
    _require_whole(call, 6, "m")
    with pytest.raises(ModelError, match="layer 0 of m does not attend to the whole prompt"):
        _require_whole(replace(call, **part), 6, "m")


def test_some_heads_and_several_prompts(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = recorded(tmp_path / "a", store="maps", reread=True)
    part = recorded(tmp_path / "b", store="maps", reread=True, heads=[2, 3], layers=[1])
    one, other = (made.key_numbers("reconstruction", 0, 1) for made in (whole, part))
    assert np.array_equal(other, one[1:])


def test_perplexity_reads_each_prompt_again(tmp_path: Path) -> None:
    """It evicts the keys that the open loop evicts from the trace of the same text."""
    made = recorded(tmp_path, store="maps", reread=True)
    ids = made.tokens(0)["token_id"].tolist()
    loaded = load(ModelSource(str(tmp_path / "model"), dtype="float32"))
    (tmp_path / "text.txt").write_text(loaded.tokenizer.decode(ids))
    job = compile_perplexity(
        ModelSource(str(tmp_path / "model"), dtype="float32"),
        [tmp_path / "text.txt"],
        ["kvzip:sinks=1"],
        BUDGET,
        PerplexityOptions(prompt=PROMPT),
    )
    (passage,) = job.closed.passages
    assert passage.ids.tolist() == ids
    for layer, read in passage.readings.items():
        assert np.allclose(read.numpy(), made.key_numbers("reconstruction", 0, layer)[:, :PROMPT], atol=1e-6)
    closed = job.execute(OutputOptions(tmp_path / "closed", False, None))
    opened = compile_replay(made, ["kvzip:sinks=1"], BUDGET).execute(OutputOptions(tmp_path / "open", False, None))
    frames = [one.residency(0).sort_values(["layer", "kv_head", "key"]) for one in (opened, closed)]
    gone = [frame["leave"].fillna(-1).to_numpy(int) == PROMPT - 1 for frame in frames]
    assert np.array_equal(*gone) and gone[0].sum() == 4 * (PROMPT - BUDGET)


def test_verify_reads_again_what_was_read_once(tmp_path: Path) -> None:
    job = compile_verify(recorded(tmp_path, store="maps"), ["kvzip:sinks=1"], BUDGET, VerifyOptions())
    (verdict,) = job.execute()
    assert verdict.decided and verdict.agrees and verdict.keys == BUDGET, verdict


def test_perplexity_of_a_model_with_windows_says_what_to_use(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(f"w{1 + number % 60}" for number in range(40)))
    source = ModelSource(str(saved(tmp_path / "m", "mistral")), dtype="float32")
    with pytest.raises(ModelError, match=r"does not attend to the whole prompt, .*\nUse another policy"):
        compile_perplexity(source, [tmp_path / "text.txt"], ["kvzip"], "50%", PerplexityOptions(prompt=20))

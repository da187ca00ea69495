"""Expected Attention against its plain-loop reference, and the rotary embedding that it reads."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from kvscope.closed_loop.decode import decode
from kvscope.core.errors import ModelError, TraceError
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.engine.signals import rotary_signal
from kvscope.model.derotation import derotations
from kvscope.model.rotary import rotary_records
from kvscope.policies.expected_attention import ExpectedAttention
from kvscope.policies.rotation import Rotation
from kvscope.replay.compile import compile_replay
from tests.engine.maps import TURNS
from tests.model.tiny import build, tokens
from tests.policies.loops import BUDGET, PROMPT, evicted_in_both, recorded
from tests.policies.vectors import sets, simulated, vectors
from tests.reference.policies.expected_attention import scores
from tests.reference.policies.loop import evict

PAIRS = [(0, 2, 1.0), (1, 3, 0.1)]  # what TURNS says


@pytest.mark.parametrize(
    ("kv_heads", "phase", "options"),
    list(
        product(
            [2, 4],
            ["prefill", "every:5"],
            [{}, {"covariance": False, "epsilon": 0.1, "sinks": 1}, {"values": False, "future": 7, "sinks": 0}],
        )
    ),
)
def test_decisions_equal_the_plain_loop(kv_heads: int, phase: str, options: dict[str, float]) -> None:
    shape = Shape((0, 1), 4, kv_heads, 17, 30)
    signals = vectors(11, shape, 6) | {"rotary": TURNS.repeat(2, 1, 1)}
    policy = ExpectedAttention(**options)  # type: ignore[arg-type]
    plan, budgets = EvictionPlan(policy, phase, "uniform"), [5, 9, 30]
    simulation, _ = simulated(plan, budgets, shape, "full", signals)
    held, given = simulation.held(0, 30), {name: options[name] for name in options if name != "values"}
    for (run, budget), layer, head in product(enumerate(budgets), range(2), range(kv_heads)):
        keys, values = (signals[name][layer, head].numpy() for name in ("keys", "values"))
        queries = signals["queries"][layer].unflatten(0, (kv_heads, -1))[head].numpy()
        expected = evict(
            30,
            budget,
            lambda t: plan.compresses(t, 17, "full"),
            lambda t, visible, k=keys, v=values, q=queries: scores(
                k, v, q[:, : t + 1], visible, PAIRS, norms=policy.values, **given
            ),
            sinks=policy.sinks,
        )
        assert sets(held[run, layer, head]) == expected
    assert (held[0, ..., -1, :] != held[0, :1, :1, -1, :]).any(), "heads decide for themselves"


def test_the_rotation_and_the_covariance_count() -> None:
    shape = Shape((0, 1), 4, 2, 17, 20)
    signals = vectors(3, shape, 6) | {"rotary": TURNS.repeat(2, 1, 1)}
    still = signals | {"rotary": torch.stack([TURNS[0] * 0, *TURNS[1:]]).repeat(2, 1, 1)}
    left = [
        simulated(policy, [9], shape, "full", given)[0].state.leave
        for policy, given in (
            (ExpectedAttention(), signals),
            (ExpectedAttention(), still),
            (ExpectedAttention(covariance=False), signals),
            (ExpectedAttention(future=4), signals),
        )
    ]
    assert all(not torch.equal(left[0], other) for other in left[1:])


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt_neox", "gpt_oss"])
def test_the_numbers_of_a_rotary_embedding_are_those_of_the_model(name: str) -> None:
    """GPT-NeoX turns two of eight dimensions, Gemma 3 turns the dimensions of its layers differently."""
    model = build(name)
    with torch.no_grad():
        found, own = rotary_records(model, tokens(1)), derotations(model, tokens(1))
    assert sorted(layer for record in found for layer in record.layers) == [0, 1]
    assert len(found) == (2 if name == "gemma3" else 1)
    for record in found:
        assert sum(frequency > 0 for frequency in record.frequencies) == (2 if name == "gpt_neox" else 8)
        rotation = Rotation(torch.from_numpy(rotary_signal(record))[None, None])
        states = torch.randn(1, 3, 9, 8, dtype=torch.float64)
        expected = own[record.layers[0]].off(states, torch.arange(40, 49))
        assert torch.allclose(rotation.off(states[None], 40)[0], expected, rtol=0, atol=1e-5)
        mean = torch.stack([own[record.layers[0]].matrix(position) for position in range(5, 12)]).mean(0).mT
        assert torch.allclose(rotation.mean(5, 7)[0, 0], mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_both_loops_evict_the_same_keys_of_a_prompt(name: str, tmp_path: Path) -> None:
    made = recorded(tmp_path, name)
    opened, decoded = evicted_in_both(made, "expected-attention:sinks=2", tmp_path, name)
    assert np.array_equal(opened, decoded) and (opened.sum(-1) == PROMPT - BUDGET).all()
    assert not opened[..., :2].any() and (opened != opened[:1, :1]).any()


def test_a_trace_says_how_its_model_turns_and_is_refused_without(tmp_path: Path) -> None:
    made = recorded(tmp_path, store="qkv")
    assert made.record.schema == 13 and made.header.rotary_of(1).frequencies[:4] == pytest.approx([1, 0.1, 0.01, 0.001])
    (tmp_path / "other").mkdir()
    other = recorded(tmp_path / "other", "gpt2", store="qkv")
    with pytest.raises(TraceError, match=r"expected-attention needs rotary, which .* does not hold\nRecord it again"):
        compile_replay(other, ["expected-attention"], "50%")


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_model_without_a_rotary_embedding_is_refused_in_the_closed_loop(name: str) -> None:
    with pytest.raises(ModelError, match=r"expected-attention\(sinks=1\) needs a rotary embedding"):
        decode(build(name), tokens(12), EvictionPlan.published(ExpectedAttention(sinks=1)), 5, prompt=8)


def test_frequencies_that_change_with_the_length_are_refused() -> None:
    model = build("llama")
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ModelError, match="fixed frequencies"), torch.no_grad():
        rotary_records(model, tokens(1))

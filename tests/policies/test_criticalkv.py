"""CriticalKV against its plain-loop reference, and the norms of projected values that it reads."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from kvscope.closed_loop.decode import decode
from kvscope.core.errors import ModelError, TraceError, UsageError
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.model.attention_hook import Call, observe_attention
from kvscope.model.outputs import output_projections
from kvscope.policies.spec import parse_policy
from kvscope.replay.compile import compile_replay
from tests.model.tiny import MODELS, build, tokens
from tests.policies.decisions import sets
from tests.policies.loops import BUDGET, PROMPT, evicted_in_both, recorded
from tests.policies.vectors import simulated
from tests.reference.policies import criticalkv as reference
from tests.reference.policies.evict import live

T, P = 30, 17
BASES = {  # base -> does it add rows up, and its protected newest keys for a budget
    "tova(scope=kv_head)": (False, lambda budget: 0),
    "h2o": (True, lambda budget: budget // 2),
    "h2o(recent=1)": (True, lambda budget: 1),
}


@pytest.mark.parametrize(
    ("base", "kv_heads", "first"), list(product(BASES, [2, 4], [0.5, 0.3, 0.0])), ids=lambda value: str(value)
)
def test_decisions_equal_the_plain_loop(base: str, kv_heads: int, first: float) -> None:
    shape, budgets = Shape((0, 1), 4, kv_heads, P, T), [4, 9, T]
    norms = torch.rand(2, kv_heads, T, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 4
    policy = parse_policy(f"criticalkv:base={base},first={first}")
    simulation, rows = simulated(policy, budgets, shape, "full", {"value_out_l1": norms})
    adds, newest = BASES[base]
    for (run, budget), layer, head in product(enumerate(budgets), range(2), range(kv_heads)):
        per = 4 // kv_heads
        own, held, scores = rows[layer, head * per : (head + 1) * per].numpy(), set[int](), np.zeros(T)
        expected = []
        for t in range(T):
            visible = held | {t}
            row = live(own, t, visible)
            scores[: t + 1] = (scores[: t + 1] if adds else 0) + row
            held = visible
            if t >= P - 1 and len(visible) > budget:
                protected = {key for key in visible if key > t - newest(budget)}
                base_scores = {key: float(scores[key]) for key in sorted(visible)}
                held = reference.retained(base_scores, norms[layer, head].tolist(), budget, protected, first=first)
            expected.append(held)
        assert sets(simulation.held(0, T)[run, layer, head]) == expected


def test_the_share_and_the_norm_decide() -> None:
    shape = Shape((0, 1), 4, 2, P, T)
    norms = torch.rand(2, 2, T, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 9
    left = {
        first: simulated(
            parse_policy(f"criticalkv:base=h2o,first={first}"), [8], shape, "full", {"value_out_l1": norms}
        )[0].state.leave
        for first in (0.5, 0.8, 1.0)
    }
    alone = simulated(parse_policy("h2o"), [8], shape, "full", {})[0].state.leave
    assert torch.equal(left[1.0], alone), "with the whole budget by scores it is the base"
    assert torch.equal(left[0.5], left[0.5]) and not torch.equal(left[0.5], alone)
    assert not torch.equal(left[0.8], left[0.5])


@pytest.mark.parametrize("base", ["full", "quest", "belady", "attention-gate", "criticalkv", "h2o(variant=mask)"])
def test_what_cannot_be_a_base_is_refused(base: str) -> None:
    with pytest.raises(UsageError, match="criticalkv cannot use the base"):
        parse_policy(f"criticalkv:base={base}")


@pytest.mark.parametrize("name", MODELS)
def test_norms_are_those_of_the_model(name: str) -> None:
    """The sum over heads of projected outputs is what the attention module returns, whatever its class."""
    model, calls, outputs = build(name), list[Call](), list[torch.Tensor]()
    with torch.no_grad():
        found = output_projections(model, tokens(9))
        with observe_attention(model, calls.append):
            hooks = [
                module.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
                for path, module in model.named_modules()
                if path.endswith(("self_attn", "attention", ".attn"))
            ]
            model(tokens(9))
            for hook in hooks:
                hook.remove()
    assert sorted(found) == [0, 1] and len(outputs) == 2
    for call, output in zip(calls, outputs, strict=True):
        weight = found[call.layer].weight
        group = len(weight) // call.value.shape[1]
        rows = call.rows(0, 9)[0]  # [H, 9, 9]
        summed = sum(rows[head] @ call.value[0, head // group] @ weight[head] for head in range(len(weight)))
        difference = output[0] - summed
        bias = difference.mean(0)
        assert torch.allclose(difference, bias.expand_as(difference), atol=1e-4), "all but a constant"
        expected = [
            reference.norms(
                call.value[0, head].numpy(), [own.numpy() for own in weight[head * group : (head + 1) * group]]
            )
            for head in range(call.value.shape[1])
        ]
        assert np.allclose(found[call.layer].norms(call.value)[0].numpy(), expected, rtol=1e-4)


def test_both_loops_evict_the_same_keys_of_a_prompt(tmp_path: Path) -> None:
    made = recorded(tmp_path, store="maps", outputs=True)
    for spec in ("criticalkv:base=snapkv(window=2)", "criticalkv:base=h2o(recent=1)"):
        opened, decoded = evicted_in_both(made, spec, tmp_path / spec[:14].replace(":", "-") / spec[16:18])
        assert np.array_equal(opened, decoded) and (opened.sum(-1) == PROMPT - BUDGET).all()


def test_some_heads_have_the_norms_of_all(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = recorded(tmp_path / "a", store="maps", outputs=True)
    part = recorded(tmp_path / "b", store="maps", outputs=True, heads=[2, 3])
    assert np.array_equal(part.key_numbers("value_out_l1", 0, 1), whole.key_numbers("value_out_l1", 0, 1)[1:])


def test_a_trace_without_the_norms_is_refused(tmp_path: Path) -> None:
    made = recorded(tmp_path)
    with pytest.raises(TraceError, match=r"needs value_out_l1, which .* does not hold\nRecord it again with --outputs"):
        compile_replay(made, ["criticalkv"], "50%")


def test_a_model_with_something_before_its_projection_is_refused() -> None:
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = torch.nn.Sequential(torch.nn.Tanh(), layer.self_attn.o_proj)
    with pytest.raises(ModelError, match="no output projection that its heads go through as they are"):
        decode(model, tokens(12), EvictionPlan.published(parse_policy("criticalkv:base=h2o")), 5, prompt=8)

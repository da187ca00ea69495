"""Delayed eviction against its plain-loop reference, and in a model."""

import itertools
from pathlib import Path

import pytest
import torch

from kvscope.closed_loop.compile import compile_closed_loop
from kvscope.closed_loop.decode import attention_facts, decode
from kvscope.closed_loop.passage import Passage
from kvscope.closed_loop.verify import VerifyJob
from kvscope.core.errors import UsageError
from kvscope.core.options import Prefill
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import runs_of
from kvscope.policies.spec import parse_policy
from kvscope.trace.reader import TokenSequence
from tests.engine.maps import attention, run, signals
from tests.gates.make import written
from tests.model.tiny import build, tokens
from tests.policies.decisions import HEADS, LENGTH, head_sets
from tests.reference.policies.dms import delayed


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize(("window", "margin"), [(0, 0.0), (1, 0.2), (6, 0.0), (6, -0.3), (LENGTH, 1.0)])
def test_decisions_equal_the_plain_loop(prefill: str, window: int, margin: float) -> None:
    plan = EvictionPlan.published(parse_policy(f"dms:window={window},margin={margin}"))
    for seed, ((heads, groups), prompt) in enumerate(itertools.product(HEADS, [1, 9, LENGTH - 1])):
        given = signals(plan, 2, heads, groups, LENGTH, seed)
        rows = attention(seed, 2, heads, LENGTH)
        simulation = run(plan, rows, [LENGTH], kv_heads=groups, prompt=prompt, prefill=prefill, given=given)
        for layer, head in itertools.product(range(2), range(groups)):
            rejected = (given["gate:demo"][layer, head] <= margin).tolist()
            assert head_sets(simulation, layer, head) == delayed(rejected, prompt, prefill, window)


def test_without_delay_it_is_attention_gate() -> None:
    rows = attention(0, 2, 4, LENGTH)
    for prefill in ("full", "stream"):
        one, other = (
            run(EvictionPlan.published(parse_policy(spec)), rows, [9], kv_heads=2, prompt=9, prefill=prefill)
            for spec in ("dms:window=0", "attention-gate:decode=true")
        )
        assert torch.equal(one.state.leave, other.state.leave)


@pytest.mark.parametrize("prefill", [Prefill.full, Prefill.stream])
def test_the_closed_loop_is_real_decoding(prefill: Prefill, tmp_path: Path) -> None:
    model, ids = build("llama").double(), tokens(26)
    plan = EvictionPlan.published(parse_policy(f"dms:gate={written(tmp_path, model)},window=4"))
    (made,) = runs_of([plan], [], loop="closed")
    job = compile_closed_loop(model, [Passage(TokenSequence(0, 12, 26), ids[0])], [made], [], prefill)
    (found,) = VerifyJob(job, attention_facts(model, ids)).execute()
    assert found.decided and found.agrees, found
    leave = torch.stack(decode(model, ids, plan, 1, prompt=12, prefill=prefill).leave)
    gone = leave < 26
    first = 11 if prefill == "full" else 0
    key = torch.arange(26)
    assert gone.any() and torch.equal(leave[gone], (key + 4).clamp(min=first).expand_as(leave)[gone])


def test_mistakes() -> None:
    with pytest.raises(UsageError, match="decides itself how many keys it evicts"):
        EvictionPlan.make(parse_policy("dms"), compress="prefill")
    with pytest.raises(UsageError, match="no gate nowhere"):
        EvictionPlan.published(parse_policy("dms:gate=nowhere")).require("full")
    with pytest.raises(UsageError, match="out of range"):
        parse_policy("dms:window=-1")

"""Q-Filters against their plain-loop reference; kvpress's decisions are in test_kvpress_decisions.py."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvscope.closed_loop.compile import compile_closed_loop
from kvscope.closed_loop.decode import attention_facts, decode
from kvscope.closed_loop.passage import Passage
from kvscope.closed_loop.verify import VerifyJob
from kvscope.core.budget import parse_budgets
from kvscope.core.errors import KvscopeError, ModelError, TraceError, UsageError
from kvscope.core.options import Prefill
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.engine.runs import runs_of
from kvscope.gates.filters import load_filters
from kvscope.policies.spec import parse_policy
from kvscope.replay.compile import compile_replay
from kvscope.trace.reader import TokenSequence, open_trace
from kvscope.training.filters import filters_of
from tests.model.tiny import build, tokens
from tests.policies.loops import BUDGET, PROMPT, evicted_in_both, recorded
from tests.policies.vectors import sets, simulated, vectors
from tests.reference.policies.loop import evict
from tests.reference.policies.q_filters import filter_of, scores

EXAMPLE = Path(__file__).parents[2] / "traces" / "example"


@pytest.mark.parametrize(
    ("kv_heads", "prefill", "phase"), list(product([2, 4], ["full", "stream"], ["step", "every:5"]))
)
def test_decisions_equal_the_plain_loop(kv_heads: int, prefill: str, phase: str) -> None:
    shape = Shape((0, 1), 4, kv_heads, 17, 30)
    keys = vectors(11, shape)["keys"]
    along = torch.randn(2, kv_heads, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    products = (keys @ along[..., None])[..., 0]
    plan, budgets = EvictionPlan(parse_policy("q-filters:recent=3"), phase, "uniform"), [5, 9, 30]
    simulation, _ = simulated(plan, budgets, shape, prefill, {"filter:demo": products})
    held = simulation.held(0, 30)
    for (run, budget), layer, head in product(enumerate(budgets), range(2), range(kv_heads)):
        own, of_head = keys[layer, head].numpy(), along[layer, head].numpy()
        expected = evict(
            30,
            budget,
            lambda t: plan.compresses(t, 17, prefill),
            lambda t, visible, own=own, of_head=of_head: scores(own, of_head, visible),
            recent=min(3, budget // 2),
        )
        assert sets(held[run, layer, head]) == expected


def test_filters_are_principal_directions_of_the_queries(tmp_path: Path) -> None:
    made = recorded(tmp_path)
    found = filters_of([made])
    for layer, head in product(range(2), range(2)):
        queries = made.vectors(0, layer, "queries")[2 * head : 2 * head + 2]
        assert np.allclose(found.directions[layer, head].numpy(), filter_of(list(queries)), atol=1e-9)
    found.write(tmp_path / "f.safetensors")
    again = load_filters(str(tmp_path / "f.safetensors"))
    assert torch.equal(again.directions, found.directions.float().double()) and again.facts == found.facts


def test_both_loops_evict_the_same_keys_and_decoding_too(tmp_path: Path) -> None:
    made = recorded(tmp_path)
    filters_of([made]).write(tmp_path / "f.safetensors")
    spec = f"q-filters:filters={tmp_path / 'f.safetensors'},recent=2"
    opened, decoded = evicted_in_both(made, spec, tmp_path)
    assert np.array_equal(opened, decoded) and (opened.sum(-1) == PROMPT - BUDGET).all()
    model, ids = build("llama").double(), tokens(26)
    (run,) = runs_of([EvictionPlan.published(parse_policy(spec))], parse_budgets("7"), loop="closed")
    passage = Passage(TokenSequence(0, 12, 26), ids[0])
    for prefill in (Prefill.full, Prefill.stream):
        job = compile_closed_loop(model, [passage], [run], [], prefill)
        (found,) = VerifyJob(job, attention_facts(model, ids)).execute()
        assert found.decided and found.agrees, found


def test_the_filters_of_the_bundled_model_are_of_the_example() -> None:
    example = open_trace(EXAMPLE)
    assert torch.allclose(load_filters("demo").directions, filters_of([example]).directions, atol=1e-6)
    compile_replay(example, ["q-filters"], "40%")


def test_filters_of_another_model_are_refused(tmp_path: Path) -> None:
    made = recorded(tmp_path)
    with pytest.raises(UsageError, match=r"filters demo are for demo: 4 layers.*the model has 2, 2, 8"):
        compile_replay(made, ["q-filters"], "50%")
    with pytest.raises(UsageError, match="filters demo are for demo"):
        decode(build("llama"), tokens(12), EvictionPlan.published(parse_policy("q-filters")), 5, prompt=8)
    with pytest.raises(UsageError, match="no filters nowhere"):
        compile_replay(made, ["q-filters:filters=nowhere"], "50%")
    (tmp_path / "h").mkdir()
    hidden = recorded(tmp_path / "h", hidden=True)
    filters_of([hidden]).write(tmp_path / "f.safetensors")
    model = build("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    plan = EvictionPlan.published(parse_policy(f"q-filters:filters={tmp_path / 'f.safetensors'}"))
    with pytest.raises(UsageError, match="this model has other weights"):
        decode(model, tokens(12), plan, 5, prompt=8)
    decode(build("llama"), tokens(12), plan, 5, prompt=8)


def test_what_cannot_give_filters_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(TraceError, match="does not hold vectors:queries"):
        filters_of([recorded(tmp_path / "a", store="maps")])
    with pytest.raises(TraceError, match="does not hold the same heads of every layer"):
        filters_of([recorded(tmp_path / "b", layers=[1])])
    with pytest.raises(TraceError, match=r"is a trace of .*, and .* of demo"):
        filters_of([open_trace(EXAMPLE), recorded(tmp_path)])


@pytest.mark.parametrize("damage", ["number", "metadata", "kind", "text"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    filters_of([open_trace(EXAMPLE)]).write(path)
    content = path.read_bytes()
    if damage == "number":
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
    elif damage == "metadata":
        path.write_bytes(content.replace(b'\\"layers\\": 4', b'\\"layers\\": 5'))
        assert path.read_bytes() != content
    elif damage == "kind":
        save_file(load_file(path), path)
    else:
        path.write_text("no filters")
    with pytest.raises(ModelError) as error:
        load_filters(str(path))
    assert isinstance(error.value, KvscopeError) and "kvscope gate filters" in str(error.value)

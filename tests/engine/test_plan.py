"""Phases, allocations and precisions: the choices that are allowed for a policy, and those that are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvscope.core.errors import UsageError
from kvscope.engine.allocation import ALLOCATORS, AllocationRequest, apportion
from kvscope.engine.plan import EvictionPlan, parse_phase
from kvscope.policies.spec import parse_policies
from tests.engine.maps import attention, run


def plan(spec: str, *choices: str | None) -> EvictionPlan:
    return EvictionPlan.make(parse_policies([spec])[0], *choices)


@given(st.data())
def test_apportion_is_exact_bounded_and_fair(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 7))
    weights = torch.tensor(data.draw(st.lists(st.integers(0, 50), min_size=size, max_size=size)), dtype=torch.float64)
    most = torch.tensor(data.draw(st.lists(st.integers(0, 40), min_size=size, max_size=size)))
    total = torch.tensor(data.draw(st.integers(0, 120)))
    got = apportion(total, weights, most)
    assert got.sum() == min(int(total), int(most.sum()))
    assert (got >= 0).all() and (got <= most).all()
    free = apportion(total, weights)
    if weights.sum() > 0:
        assert ((free - weights * total / weights.sum()).abs() < 1 + 1e-6).all(), "less than one key away"


def test_apportion_gives_the_excess_over_a_limit_to_the_others() -> None:
    got = apportion(torch.tensor(12), torch.tensor([10.0, 1.0, 1.0]), torch.tensor([4, 10, 10]))
    assert got.tolist() == [4, 4, 4]


def request(budgets: list[int], *, layers: int, prompt: int, fixed: int = 0) -> AllocationRequest:
    return AllocationRequest(
        budget=torch.tensor(budgets),
        fixed=torch.full((len(budgets),), fixed),
        layers=torch.arange(layers),
        n_layers=layers,
        heads=2,
        prompt=prompt,
    )


def test_pyramid_by_hand() -> None:
    """20 free keys: from 2 * 20 - 1 in the first layer to 1 in the last, 4 layers: 39, 26.3, 13.7, 1."""
    share = ALLOCATORS.get("pyramid")().share(request([24], layers=4, prompt=500, fixed=4))
    assert share[0, :, 0].tolist() == [43, 30, 18, 5]
    assert torch.equal(share[..., 0], share[..., 1])


def test_pyramid_of_some_layers_is_part_of_the_pyramid_of_all() -> None:
    whole = ALLOCATORS.get("pyramid")().share(request([24, 60], layers=6, prompt=500))
    some = request([24, 60], layers=6, prompt=500)
    some.layers = torch.tensor([1, 4])
    assert torch.equal(ALLOCATORS.get("pyramid")().share(some), whole[:, [1, 4]])


def test_pyramid_gives_no_layer_more_than_the_prompt_has() -> None:
    share = ALLOCATORS.get("pyramid")().share(request([44], layers=4, prompt=80, fixed=4))
    assert share[0, :, 0].tolist() == [80, 56, 32, 8]


def test_ada_by_hand() -> None:
    """Of the 8 best scores head 0 has 6 and head 1 has 2; with a fifth of 4 for each: .8 * 6 + .8, .8 * 2 + .8."""
    asked = request([4], layers=1, prompt=8)
    asked.score = torch.tensor([[[[9.0, 8, 7, 6, 5, 4, 0, 0], [9.0, 8, 3, 3, 3, 3, 3, 3]]]])
    assert ALLOCATORS.get("ada")().share(asked).tolist() == [[[6, 2]]]


def test_ada_in_a_replay_gives_keys_to_the_head_with_spread_attention() -> None:
    length, prompt = 40, 30
    rows = attention(3, 1, 2, length)
    peaked = torch.zeros(length, length, dtype=torch.float64)
    peaked[:, 0] = 0.98
    peaked += 0.02 * rows[0, 0]
    spread = torch.tril(torch.ones(length, length, dtype=torch.float64))
    spread = spread / spread.sum(-1, keepdim=True)
    rows = torch.stack([peaked / peaked.sum(-1, keepdim=True), spread])[None]
    simulation = run(plan("h2o:recent=0", None, "ada"), rows, [10], kv_heads=2, prompt=prompt, prefill="full")
    peaked_keys, spread_keys = simulation.state.budget[0, 0].tolist()
    assert peaked_keys < 10 < spread_keys and peaked_keys + spread_keys == 20
    assert simulation.held(prompt - 1, length)[0, 0, :, 0].sum(-1).tolist() == [peaked_keys, spread_keys]


def test_cake_prefers_the_layer_with_spread_and_changing_attention() -> None:
    length, prompt = 60, 50
    steady = torch.zeros(length, length, dtype=torch.float64)
    steady[:, 0] = 0.99
    rows = attention(4, 2, 2, length)
    rows[1] = 0.01 * rows[1] + steady
    rows[1] /= rows[1].sum(-1, keepdim=True)
    simulation = run(plan("tova", None, "cake"), rows, [12], kv_heads=2, prompt=prompt, prefill="full")
    first, second = simulation.state.budget[0, :, 0].tolist()
    assert first > 12 > second and first + second == 24


def test_phases_by_hand() -> None:
    rows = attention(5, 1, 2, 24)
    at = {"kv_heads": 2, "prompt": 10, "prefill": "full"}
    held = {
        phase: run(plan("h2o", phase), rows, [6], **at).held(0, 24)[0, 0, 0].sum(-1).tolist()
        for phase in ("prefill", "every:4", "step")
    }
    assert held["prefill"] == [*range(1, 10), *range(6, 21)]
    assert held["every:4"] == [*range(1, 10), 6, 7, 8, 9, 6, 7, 8, 9, 6, 7, 8, 9, 6, 7, 8]
    assert held["step"] == [*range(1, 10), *[6] * 15]


def test_a_phase_is_parsed_or_refused() -> None:
    assert parse_phase("every:16") == "every:16" and parse_phase("every:1") == "step"
    for wrong in ("every", "every:0", "every:-2", "each", "prefill:3", ""):
        with pytest.raises(UsageError, match="--compress"):
            parse_phase(wrong)


@pytest.mark.parametrize(
    ("spec", "compress", "allocate", "why"),
    [
        ("recycled-attention", "step", None, "reads a part"),
        ("recycled-attention", None, "ada", "reads a part"),
        ("scissorhands:variant=released", "every:4", None, "decides itself"),
        ("h2o:variant=mask", None, "pyramid", "reads a part"),
        ("tova", None, "ada", "decides per layer"),
        ("h2o", None, "adda", "no allocation"),
    ],
)
def test_impossible_choices_are_refused_with_the_reason(
    spec: str, compress: str | None, allocate: str | None, why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        plan(spec, compress, allocate)


def test_streaming_prefill_has_no_end_of_the_prompt() -> None:
    for made in (plan("h2o", "prefill"), plan("h2o", None, "ada"), plan("snapkv")):
        with pytest.raises(UsageError):
            made.require("stream")


def test_the_label_names_choices_that_differ_from_the_published_plan() -> None:
    assert plan("h2o").label == "h2o"
    assert plan("h2o:recent=4", "every:8", "ada", "float16").label == "h2o(recent=4) [every:8, ada, float16]"
    assert plan("pyramidkv", "prefill", "pyramid").label == "pyramidkv"


def test_half_precision_accumulates_as_the_authors_code() -> None:
    """The prompt's column sum is rounded once, then every step; a sum above 2048 no longer grows by less than 1."""
    length, prompt = 60, 30
    rows = attention(6, 1, 2, length, "half")
    made = run(plan("h2o:recent=4", None, None, "float16"), rows, [12], kv_heads=2, prompt=prompt, prefill="full")
    for head in range(2):
        full = rows[0, head].numpy().astype(np.float16)
        sums = full[:prompt, :].astype(np.float32).sum(0).astype(np.float16)
        held = sorted({*sorted(range(prompt - 4), key=lambda j: (-sums[j], -j))[:8], *range(prompt - 4, prompt)})
        for t in range(prompt, length):
            seen = [*held, t]
            row = full[t, seen].astype(np.float64)
            for key, weight in zip(seen, (row / row.sum()).astype(np.float16), strict=True):
                sums[key] = np.float16(sums[key] + weight)
            gone = min(seen[:-4], key=lambda j: (sums[j], j))
            held = [key for key in seen if key != gone]
            assert made.held(t, t + 1)[0, 0, head, 0].nonzero().flatten().tolist() == held


@pytest.mark.parametrize("phase", ["step", "prefill", "every:3", "every:7"])
@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_the_steps_that_evict_are_those_of_a_loop(phase: str, prefill: str) -> None:
    if phase == "prefill" and prefill == "stream":
        return  # not defined, and refused
    every = {"step": 1, "prefill": 10**6}.get(phase) or int(phase.partition(":")[2])
    made = plan("h2o", phase)
    for prompt, length in ((1, 1), (5, 20), (20, 20), (7, 30)):
        expected = []
        for t in range(length):
            since = t - (prompt - 1) if prefill == "full" else t + 1
            if since >= 0 and since % every == 0 and not (prefill == "stream" and since == 0):
                expected.append(t)
        assert list(made.evicting_steps(prompt, length, prefill)) == expected
        assert [t for t in range(length) if made.compresses(t, prompt, prefill)] == expected

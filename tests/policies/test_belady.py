"""Belady against every schedule that there is, and against an independent assignment."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.engine.plan import EvictionPlan
from kvscope.policies import POLICIES
from kvscope.policies.spec import parse_policy
from tests.engine.maps import KINDS, attention, run
from tests.reference.policies.belady import best_by_assignment, best_of_all

PREFILLS = ["full", "stream"]
BELADY, PER_LAYER = parse_policy("belady"), parse_policy("belady:scope=layer")


def adversarial(length: int) -> torch.Tensor:
    """Return maps ``[L, 1, T, T]`` that mislead a greedy schedule: keys that come back late, in turn, or all alike."""
    t, k = torch.meshgrid(torch.arange(length), torch.arange(length), indexing="ij")
    shapes = [
        torch.ones(length, length),  # all alike: every schedule is as good
        (t == k).double(),  # nothing but the own key
        (k == 0).double(),  # nothing but the first
        (k == (t * 5 + 1) % (t + 1)).double(),  # one key at a time, jumping
        (k == t % 3).double(),  # three keys in turn
        (2.0 ** (t - 2 * k).clamp(-8, 8)),  # old keys
        torch.where((t == length - 1) & (k < 3), 9.0, 1.0 / (t - k + 1).clamp(min=1)),  # late return of the oldest
        ((t + k) % 2 == 0).double() + 1e-3,
    ]
    rows = torch.stack([torch.tril(shape.double()) for shape in shapes])
    total = rows.sum(-1, keepdim=True)
    return (rows / torch.where(total > 0, total, 1))[:, None]


def retained(policy, rows: torch.Tensor, budget: int, **at) -> torch.Tensor:
    """Return the mass that the scored steps retain, of the mean row of each deciding head, ``[L, S]``."""
    kv_heads, length = at["kv_heads"], rows.shape[-1]
    simulation = run(policy, rows, [budget], **at)
    first = at["prompt"] if at["prefill"] == "full" else 0
    mean = rows.view(rows.shape[0], kv_heads, -1, length, length).mean(2)
    return (mean * simulation.visible(0, length)[0])[:, :, first:].sum((-1, -2))


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("length", range(2, 8))
def test_no_schedule_of_a_few_tokens_is_better(length: int, prefill: str) -> None:
    """All of them are tried, for every prompt and budgets of 1 to 3: an offset by one anywhere would lose mass."""
    rows = torch.cat(
        [adversarial(length), *(attention(3, 3, 1, length, kind) for kind in ("smooth", "ties", "sparse"))]
    )
    for budget, prompt in product((1, 2, 3), range(1, length)):
        got = retained(BELADY, rows, budget, kv_heads=1, prompt=prompt, prefill=prefill)
        for layer, mass in enumerate(got[:, 0].tolist()):
            most = best_of_all(rows[layer, 0].tolist(), budget, prompt, prefill)
            assert mass == pytest.approx(most, abs=1e-12), (layer, budget, prompt)


@pytest.mark.parametrize("prefill", PREFILLS)
@pytest.mark.parametrize("window", [2, 3, 5])
def test_no_schedule_is_better_where_the_model_forgets_keys_itself(window: int, prefill: str) -> None:
    length = 8
    rows = torch.cat([adversarial(length), attention(4, 4, 1, length)])
    age = torch.arange(length)[:, None] - torch.arange(length)
    for budget, prompt in product((1, 2, 4), (1, 3, 6)):
        simulation = run(
            BELADY, rows, [budget], kv_heads=1, prompt=prompt, prefill=prefill, windows=(window,) * len(rows)
        )
        mass = rows[:, 0] * simulation.visible(0, length)[0, :, 0]
        first = prompt if prefill == "full" else 0
        for layer, got in enumerate(mass[:, first:].sum((-1, -2)).tolist()):
            seen = torch.where(age < window, rows[layer, 0], 0.0)
            most = best_of_all(seen.tolist(), budget, prompt, prefill, window)
            assert got == pytest.approx(most, abs=1e-12), (layer, budget, prompt)


@given(
    seed=st.integers(0, 10_000),
    kind=KINDS,
    length=st.integers(2, 120),
    prefill=st.sampled_from(PREFILLS),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_it_retains_what_an_assignment_by_scipy_does(seed, kind, length, prefill, data) -> None:
    prompt, budget = data.draw(st.integers(1, length - 1)), data.draw(st.integers(1, length))
    rows = attention(seed, 1, 4, length, kind)
    rows /= rows.sum(-1, keepdim=True)  # float16 rows do not sum to one
    at = {"kv_heads": 2, "prompt": prompt, "prefill": prefill}
    heads = rows[0].view(2, 2, length, length).mean(1).numpy()
    most = [best_by_assignment(head, budget, prompt, prefill) for head in heads]
    assert retained(BELADY, rows, budget, **at)[0].tolist() == pytest.approx(most, abs=1e-9)
    most = best_by_assignment(heads.mean(0), budget, prompt, prefill)
    assert retained(PER_LAYER, rows, budget, **at).mean().item() == pytest.approx(most, abs=1e-9)


def irreversible() -> list[EvictionPlan]:
    """Return every registered policy that can be made to hold ``B`` keys in each head at every step."""
    plans = []
    for _, cls in POLICIES.items():
        policy = cls()
        free = policy.traits.bounded and not policy.traits.reads and not policy.traits.published
        if free and not policy.traits.clairvoyant:
            plans.append(EvictionPlan.make(policy, "step", "uniform"))
    return plans


@pytest.mark.slow
@given(
    plan=st.sampled_from(irreversible()), seed=st.integers(0, 10_000), kind=KINDS, prefill=st.sampled_from(PREFILLS),
    prompt=st.integers(10, 24), budget=st.integers(5, 26),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_no_policy_retains_more_in_any_head(plan, seed, kind, prefill, prompt, budget) -> None:
    if prefill not in plan.policy.traits.prefills:
        prefill = "full"
    rows = attention(seed, 2, 4, 30, kind)
    rows /= rows.sum(-1, keepdim=True)
    at = {"kv_heads": 2, "prompt": prompt, "prefill": prefill}
    own, most = retained(plan, rows, budget, **at), retained(BELADY, rows, budget, **at)
    assert (own <= most + 1e-9).all()
    if plan.policy.traits.scope == "layer":
        assert (own.mean(1) <= retained(PER_LAYER, rows, budget, **at).mean(1) + 1e-9).all()


def test_there_are_policies_to_compare_with() -> None:
    assert len(irreversible()) > 12


def test_a_decision_for_the_layer_serves_its_heads_less_well() -> None:
    rows = attention(2, 3, 4, 40)
    at = {"kv_heads": 2, "prompt": 12, "prefill": "full"}
    apart, together = (retained(policy, rows, 8, **at).mean(1) for policy in (BELADY, PER_LAYER))
    assert (together < apart).all()


def test_heavier_tokens_are_bought_with_a_lighter_cache_now() -> None:
    """Key 0 gets nothing for a while and everything at the end: all that looks at the past lets it go."""
    length = 12
    rows = torch.zeros(1, 1, length, length, dtype=torch.float64)
    rows[0, 0, :, :] = torch.eye(length) * 0.5 + torch.diag(torch.full((length - 1,), 0.5), -1)
    rows[0, 0, 0, 0] = 1.0
    rows[0, 0, 8:, :] = 0.0
    rows[0, 0, 8:, 0] = 1.0
    at = {"kv_heads": 1, "prompt": 4, "prefill": "stream"}
    simulation = run(BELADY, rows, [2], **at)
    assert simulation.visible(8, length)[0, 0, 0, :, 0].all()
    assert retained(BELADY, rows, 2, **at).item() == pytest.approx(length)
    assert retained(parse_policy("tova"), rows, 2, **at).item() == pytest.approx(length - 4)


def test_sixteen_bit_rows_count_by_their_share() -> None:
    """Rows that do not sum to one are divided by their sum, as the metric does, or heads would be weighed unequally."""
    rows = attention(5, 1, 2, 20)
    scaled = rows * torch.tensor([1.0, 0.25])[:, None, None]
    at = {"kv_heads": 1, "prompt": 6, "prefill": "full"}
    assert torch.equal(run(BELADY, rows, [4], **at).state.leave, run(BELADY, scaled, [4], **at).state.leave)


def test_the_two_references_agree() -> None:
    """The two references are written differently and must agree, or neither proves anything."""
    for seed in range(20):
        rows = attention(seed, 1, 1, 7)[0, 0]
        for budget, prompt, prefill in product((1, 2, 3), (1, 2, 5), PREFILLS):
            one = best_of_all(rows.tolist(), budget, prompt, prefill)
            assert best_by_assignment(rows.numpy(), budget, prompt, prefill) == pytest.approx(one, abs=1e-12)

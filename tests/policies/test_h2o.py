"""H2O's variants against plain loops of the published codes, and the sets those codes decided."""

import pytest
import torch

import kvscope.policies.h2o  # noqa: F401
from kvscope.core.errors import UsageError
from kvscope.engine.plan import EvictionPlan
from kvscope.policies.spec import parse_policies
from tests.engine.maps import attention, run
from tests.policies.decisions import LENGTH, golden, golden_simulation, heads_at, simulations
from tests.reference.policies import h2o as reference

ODD = [(1, 5), (4, 9), (9, 9), (17, 7), (LENGTH - 1, 3), (12, 3), (20, LENGTH + 1), (3, LENGTH - 1), (11, 13)]


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("reduce", ["scores", "rows"])
@pytest.mark.parametrize("group", ["mean", "max", "sum"])
def test_drop_decisions_equal_the_plain_loop(prefill: str, group: str, reduce: str) -> None:
    for rows, visible, held, prompt, budget in simulations(f"h2o:group={group},reduce={reduce}", prefill):
        assert (visible, held) == reference.drop(rows, budget, prompt, prefill, budget // 2, group, reduce)


@pytest.mark.parametrize("reduce", ["scores", "rows"])
def test_mask_of_the_largest_of_a_group(reduce: str) -> None:
    """In the loop the sums of a key that is lost are zero in every query head."""
    cases = [(1, 5), (4, 9), (9, 9), (10, 9), (17, 6), (LENGTH - 1, 3), (12, 3)]
    for rows, visible, _, prompt, budget in simulations(f"h2o:variant=mask,group=max,reduce={reduce}", "full", cases):
        newest = max(budget // 2, 1)
        assert visible == reference.mask(rows, budget - newest, newest, prompt, "max", reduce)


def test_sums_of_query_heads_are_rounded_as_those_of_groups() -> None:
    """Where each group has one query head, the largest is the mean, also in half precision, which changes decisions."""
    rows = attention(5, 2, 4, 120)
    held = {}
    for group, precision in (("mean", "bfloat16"), ("max", "bfloat16"), ("max", None)):
        plan = EvictionPlan.make(parse_policies([f"h2o:group={group}"])[0], accumulate=precision)
        held[group, precision] = run(plan, rows, [20], kv_heads=4, prompt=1, prefill="stream").held(0, 120)
    assert torch.equal(held["max", "bfloat16"], held["mean", "bfloat16"])
    assert not torch.equal(held["max", "bfloat16"], held["max", None])


def test_flexgen_of_the_largest_of_a_group() -> None:
    for rows, visible, held, prompt, budget in simulations("h2o:variant=flexgen,group=max", "full", ODD):
        assert (visible, held) == reference.flexgen(rows, (budget + 1) // 2, prompt, "max")


@pytest.mark.parametrize("recent", [None, 1, 3])
def test_mask_decisions_equal_the_published_loop(recent: int | None) -> None:
    cases = [(1, 5), (4, 9), (9, 9), (10, 9), (17, 6), (LENGTH - 1, 3), (12, 3), (20, LENGTH), (3, LENGTH - 2)]
    spec = "h2o:variant=mask" + ("" if recent is None else f",recent={recent}")
    returned = 0
    for rows, visible, held, prompt, budget in simulations(spec, "full", cases):
        newest = max(budget // 2, 1) if recent is None else recent
        expected = reference.mask(rows, budget - newest, newest, prompt)
        assert visible == expected
        assert held == [set(range(t + 1)) for t in range(LENGTH)]
        steps = zip(expected[prompt:], expected[prompt + 1 :], strict=False)
        returned += sum(bool({key for key in after - before if key < max(before)}) for before, after in steps)
    assert returned > 0, "no key came back, so limbo was not compared"


def test_mask_at_a_budget_of_one_sees_the_query_alone() -> None:
    for _, visible, _, prompt, _ in simulations("h2o:variant=mask", "full", [(4, 1), (1, 1)]):
        # a cache of exactly the budget is not cut yet
        assert visible[prompt:] == [{0, 1} if t == 1 else {t} for t in range(prompt, LENGTH)]


def test_mask_golden() -> None:
    expected = golden("h2o", "mask")
    simulation = golden_simulation("h2o:variant=mask,recent=3", 6, "full", 21)
    for step, keys in expected["visible"].items():
        assert heads_at(simulation.visible(0, 21), int(step)) == keys


def test_drop_golden() -> None:
    expected = golden("h2o", "real drop")
    held = golden_simulation("h2o:recent=3", 6, "full").held(0, 20)
    assert heads_at(held, 11) == expected["cache_after_prefill"]
    assert heads_at(held, 19) == expected["cache_final"]


def test_flexgen_decisions_equal_its_slots() -> None:
    differs = 0
    plain = simulations("h2o", "full", ODD)
    for (rows, visible, held, prompt, budget), usual in zip(
        simulations("h2o:variant=flexgen", "full", ODD), plain, strict=True
    ):
        assert (visible, held) == reference.flexgen(rows, (budget + 1) // 2, prompt)
        differs += held != usual[2]
    assert differs > 0, "the newest keys' window never mattered"


def test_flexgen_runs_do_not_mix() -> None:
    rows = attention(3, 2, 4, 30)
    policy = parse_policies(["h2o:variant=flexgen"])[0]
    together = run(policy, rows, [5, 9, 33], kv_heads=2, prompt=10, prefill="full")
    for index, budget in enumerate([5, 9, 33]):
        alone = run(policy, rows, [budget], kv_heads=2, prompt=10, prefill="full")
        assert torch.equal(together.state.leave[index], alone.state.leave[0])


def test_mask_runs_do_not_mix() -> None:
    rows = attention(3, 2, 4, 30)
    policy = parse_policies(["h2o:variant=mask"])[0]
    together = run(policy, rows, [4, 9, 33], kv_heads=2, prompt=10, prefill="full")
    for index, budget in enumerate([4, 9, 33]):
        alone = run(policy, rows, [budget], kv_heads=2, prompt=10, prefill="full")
        assert torch.equal(together.visible(0, 30)[index], alone.visible(0, 30)[0])


@pytest.mark.parametrize(
    ("spec", "budget", "says"),
    [
        ("h2o:variant=mask,recent=0", 4, "hides the current key"),
        ("h2o:variant=flexgen,recent=3", 5, "cannot be used with variant=flexgen"),
        ("h2o:variant=flexgen", 8, "odd number of keys, 3 or more, and the budget is 8"),
        ("h2o:variant=flexgen", 1, "odd number of keys"),
    ],
)
def test_what_is_refused(spec: str, budget: int, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run(parse_policies([spec])[0], attention(1, 1, 2, 12), [budget], kv_heads=2, prompt=10, prefill="full")


@pytest.mark.parametrize("variant", ["mask", "flexgen"])
def test_variants_are_reproductions_for_full_prefill(variant: str) -> None:
    policy = parse_policies([f"h2o:variant={variant}"])[0]
    assert policy.traits.published and policy.traits.reads == (variant == "mask")
    assert policy.label == f"h2o(variant={variant})"
    with pytest.raises(UsageError, match="not defined for stream prefill"):
        run(policy, attention(1, 1, 2, 12), [5], kv_heads=2, prompt=1, prefill="stream")

"""RoCo against its plain-loop references."""

import itertools

import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.policies.spec import parse_policy
from tests.engine.maps import attention, run
from tests.policies.decisions import HEADS, LENGTH, PROMPTS_BUDGETS, sets, simulations
from tests.reference.policies import roco as reference

# where deviations matter: budgets at which more keys are out of reach than are protected
CASES = [*PROMPTS_BUDGETS, (1, 12), (10, 15), (23, 16), (24, 20)]


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        ("roco", {}),
        ("roco:recent=1", {"recent": 1}),
        ("roco:recent=0,std_ratio=0.5", {"recent": 0, "ratio": 0.5}),
        ("roco:recent=2,group=max", {"recent": 2, "group": "max"}),
        ("roco:recent=2,group=max,reduce=scores", {"recent": 2, "group": "max", "reduce": "scores"}),
        ("roco:recent=2,reduce=scores", {"recent": 2, "reduce": "scores"}),
        ("roco:recent=2,std_ratio=0", {"recent": 2, "ratio": 0.0}),
    ],
)
def test_mean_and_deviation_decide(spec: str, settings: dict, prefill: str) -> None:
    for rows, visible, held, prompt, budget in simulations(spec, prefill, CASES):
        assert (visible, held) == reference.plain(rows, budget, prompt, prefill, **settings)


def test_deviations_change_decisions() -> None:
    """Were the feasible set forgotten, this alone would tell."""
    rows = attention(3, 2, 4, 40)
    one, other = (
        run(
            parse_policy(f"roco:recent=1,std_ratio={ratio}"), rows, [12], kv_heads=2, prompt=9, prefill="full"
        ).state.leave
        for ratio in (0, 0.3)
    )
    assert (one != other).any()


@pytest.mark.parametrize(("prompt", "budget"), [(1, 1), (5, 3), (8, 12), (2, 31), (50, 40), (3, 44)])
@pytest.mark.parametrize("recent", [10, 2])  # that of the code, and one that leaves more to the deviations
def test_the_published_decoding_mode(prompt: int, budget: int, recent: int) -> None:
    length = 60
    for seed, (heads, groups) in enumerate([(2, 2), (4, 2), (2, 1)]):
        rows = attention(seed, 2, heads, length)
        policy = parse_policy(f"roco:variant=easykv,recent={recent}")
        simulation = run(policy, rows, [prompt + budget], kv_heads=groups, prompt=prompt, prefill="full")
        per = heads // groups
        for layer, group in itertools.product(range(2), range(groups)):
            visible, held = reference.easykv(
                rows[layer, group * per : (group + 1) * per].numpy(), budget, prompt, recent
            )
            assert sets(simulation.visible(0, length)[0, layer, group]) == visible
            assert sets(simulation.held(0, length)[0, layer, group]) == held


def test_a_variance_that_rounds_below_zero_is_the_largest_in_the_published_code() -> None:
    """Key 1 has the smallest weights, the same in each row; six squares of this one sum to less than six times it."""
    weight, unit = 109951162778 / 2**40, 2.0**-40  # multiples of the unit, so that sums are exact
    squares = 0.0
    for _ in range(6):
        squares += weight**2
    assert squares / 6 - (6 * weight / 6) ** 2 < 0
    rows = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
    rows[..., 0, 0] = 1
    for t in range(1, 7):
        rows[..., t, 1] = weight
        for key in range(2, t + 1):
            rows[..., t, key] = weight + unit * 2**36 * (1 + (t + key) % 2) / 16
        rows[..., t, 0] = 1 - rows[..., t, :].sum()
    spec = "roco:variant=easykv,recent=1"
    simulation = run(parse_policy(spec), rows, [6], kv_heads=1, prompt=1, prefill="full")
    held = sets(simulation.held(0, 7)[0, 0, 0])
    assert held == reference.easykv(rows[0].numpy(), 5, 1, newest=1)[1]
    assert 1 in held[6] and len(held[6]) == 6


def test_budgets_in_one_scan_equal_one_by_one() -> None:
    rows = attention(5, 2, 4, 40)
    for spec, budgets in (("roco:recent=2", [4, 11, 18]), ("roco:variant=easykv", [12, 17, 25])):
        together = run(parse_policy(spec), rows, budgets, kv_heads=2, prompt=10, prefill="full")
        for index, budget in enumerate(budgets):
            alone = run(parse_policy(spec), rows, [budget], kv_heads=2, prompt=10, prefill="full")
            assert (together.state.leave[index] == alone.state.leave[0]).all()


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match=r"std_ratio=2\.0 is out of range"):
        parse_policy("roco:std_ratio=2")
    rows = attention(0, 1, HEADS[0][0], LENGTH)
    with pytest.raises(UsageError, match="more than the budget of 9"):
        run(parse_policy("roco:variant=easykv"), rows, [9], kv_heads=2, prompt=10, prefill="full")
    with pytest.raises(UsageError, match="not defined for stream prefill"):
        run(parse_policy("roco:variant=easykv"), rows, [9], kv_heads=2, prompt=4, prefill="stream")

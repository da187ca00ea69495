"""PyramidInfer against its plain-loop reference: votes of recent rows, and budgets that fall from layer to layer."""

import pytest

from kvscope.core.errors import UsageError
from kvscope.policies.spec import parse_policy
from tests.engine.maps import run
from tests.policies.decisions import groups, head_sets
from tests.reference.policies import allocations
from tests.reference.policies.pyramidinfer import pyramidinfer

LENGTH, LAYERS = 50, 4
CASES = [(44, 12), (38, 25), (36, 17), (9, 9), (3, 12), (40, LENGTH), (47, 1), (48, 2), (45, 3), (42, 40)]


@pytest.mark.parametrize(("recent", "distance", "sinks"), [(0.2, 1.2, 4), (0.5, 3.0, 0), (0.0, 1.0, 1), (0.3, 0.0, 2)])
def test_decisions_and_budgets_equal_the_plain_loop(recent: float, distance: float, sinks: int) -> None:
    moved = 0
    settings = {"recent": recent, "distance": distance, "sinks": sinks}
    policy = parse_policy(f"pyramidinfer:recent={recent},distance={distance},sinks={sinks}")
    for seed, (prompt, budget) in enumerate(CASES):
        rows, _ = groups(seed, 4, 2, LAYERS, LENGTH)
        simulation = run(policy, rows, [budget], kv_heads=2, prompt=prompt, prefill="full")
        kept = policy.protect(budget)
        shares = allocations.decay(budget, kept.sinks + kept.recent, prompt, LAYERS)
        assert sum(shares) == budget * LAYERS
        assert simulation.state.budget[0, :, 0].tolist() == shares
        moved += shares != [budget] * LAYERS and shares == sorted(shares, reverse=True)
        for layer in range(LAYERS):
            expected = pyramidinfer(rows[layer].numpy(), budget, prompt, capacity=shares[layer], **settings)
            assert head_sets(simulation, layer, 0) == head_sets(simulation, layer, 1) == expected
    assert moved >= 3


def test_factors_are_those_of_the_code() -> None:
    """Of 1000 keys, 32 layers keep what ``int(context * ratio)`` leaves one after the other, as shares of the total."""
    from math import cos, pi  # as in the code, whose context is cut to whole keys at every layer

    context, kept = 100_000, []
    for layer in range(32):
        context = int(context * ((1.0 - 0.9) * (cos(pi * layer / 32) + 1) / 2 + 0.9))
        kept.append(context)
    mean = sum(kept) // 32
    shares = allocations.decay(mean, 0, 100_000, 32)
    assert max(abs(ours - theirs) for ours, theirs in zip(shares, kept, strict=True)) < 40
    assert shares[0] > 4 * shares[-1]


@pytest.mark.parametrize("setting", ["recent=0.6", "distance=-1", "sinks=-1"])
def test_what_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=setting.split("=")[0]):
        parse_policy(f"pyramidinfer:{setting}")

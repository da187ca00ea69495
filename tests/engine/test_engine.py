"""The simulation compared with its plain-loop reference: a wrong axis or tie would change a decision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.core.errors import ReplayError, UsageError
from kvscope.engine.cache_state import CacheState
from kvscope.engine.draw import Draws
from kvscope.engine.plan import require_room
from kvscope.engine.rows import Shape
from kvscope.engine.simulation import CacheSimulation
from kvscope.policies.base import Policy, Step
from kvscope.policies.spec import parse_policies
from tests.engine.maps import KINDS, attention, run
from tests.reference import replay as twin

TWINS = {
    "h2o": (twin.h2o, lambda budget: (0, budget // 2)),
    "h2o:recent=0": (twin.h2o, lambda budget: (0, 0)),
    "a2sf:alpha=0.5": (twin.a2sf(0.5), lambda budget: (0, 0)),
    "a2sf:alpha=0,recent=1": (twin.a2sf(0.0), lambda budget: (0, 1)),
    "tova": (twin.tova, lambda budget: (0, 0)),
    "window": (twin.newest, lambda budget: (0, 0)),
    "streaming-llm:sinks=2": (twin.newest, lambda budget: (2, 0)),
}


@given(
    spec=st.sampled_from(sorted(TWINS)),
    seed=st.integers(0, 10_000),
    kind=KINDS,
    length=st.integers(1, 14),
    data=st.data(),
    prefill=st.sampled_from(["full", "stream"]),
)
@settings(max_examples=120, deadline=None)
def test_decisions_equal_the_plain_loop(spec, seed, kind, length, data, prefill) -> None:
    prompt = data.draw(st.integers(1, length))
    budget = data.draw(st.integers(3, length + 2))
    groups = data.draw(st.sampled_from([1, 2]))
    rows = attention(seed, 2, 2 * groups, length, kind)
    policy = parse_policies([spec])[0]
    simulation = run(policy, rows, [budget], kv_heads=groups, prompt=prompt, prefill=prefill)
    observe, protection = TWINS[spec]
    sinks, recent = protection(budget)
    for layer in range(2):
        for group in range(groups):
            shared = rows[layer] if policy.scope == "layer" else rows[layer, 2 * group : 2 * group + 2]
            visible, held = twin.replay(shared.tolist(), observe, budget, prompt, prefill, sinks, recent)
            seen, kept = simulation.visible(0, length)[0, layer, group], simulation.held(0, length)[0, layer, group]
            assert [set(row.nonzero().flatten().tolist()) for row in seen] == visible
            assert [set(row.nonzero().flatten().tolist()) for row in kept] == held


def test_budgets_in_one_simulation_equal_one_by_one() -> None:
    rows = attention(3, 2, 4, 40)
    policy = parse_policies(["h2o"])[0]
    together = run(policy, rows, [4, 9, 60], kv_heads=2, prompt=10, prefill="full")
    for index, budget in enumerate([4, 9, 60]):
        alone = run(policy, rows, [budget], kv_heads=2, prompt=10, prefill="full")
        assert torch.equal(together.state.leave[index], alone.state.leave[0])


def test_layers_in_one_simulation_equal_one_by_one() -> None:
    rows = attention(4, 3, 4, 30)
    policy = parse_policies(["random:seed=5"])[0]
    together = run(policy, rows, [6], kv_heads=2, prompt=1, prefill="stream")
    for layer in range(3):
        alone = CacheSimulation(policy, [6], Shape((layer,), 4, 2, 1, 30), "stream", dtype=torch.float64)
        for t in range(30):
            alone.step(t, rows[layer : layer + 1, :, t, : t + 1])
        assert torch.equal(together.state.leave[:, layer : layer + 1], alone.state.leave)


def test_protection_beyond_the_budget_is_an_error() -> None:
    with pytest.raises(UsageError, match="protects 4 first and 0 last keys, more than the budget of 3"):
        require_room(parse_policies(["streaming-llm"])[0], 3, 1)


class _Nan(Policy):
    name = "nan"

    def observe(self, step: Step, score: torch.Tensor) -> torch.Tensor:
        return step.weights() * torch.nan


def test_nan_scores_are_an_error() -> None:
    with pytest.raises(ReplayError, match="not numbers"):
        run(_Nan(), attention(1, 1, 2, 8), [3], kv_heads=2, prompt=1, prefill="stream")


def test_infinite_scores_never_evict_protected_keys() -> None:
    class Infinite(Policy):
        name = "infinite"

        def observe(self, step: Step, score: torch.Tensor) -> torch.Tensor:
            return step.weights() + torch.inf

    simulation = run(Infinite(), attention(1, 1, 2, 8), [3], kv_heads=2, prompt=1, prefill="stream")
    assert (simulation.held(0, 8).sum(-1)[..., 3:] == 3).all()


def test_keys_that_slide_out_of_a_window_do_not_count_as_evictions() -> None:
    rows = attention(5, 2, 2, 12)
    simulation = run(parse_policies(["tova"])[0], rows, [6], kv_heads=2, prompt=1, prefill="stream", windows=(4, None))
    counts = simulation.visible(0, 12).sum(-1)
    assert counts[0, 0, 0].tolist() == [1, 2, 3] + [4] * 9
    assert simulation.state.evictions[0, :, 0].tolist() == [0, 6]
    assert counts[0, 1, 0].max() == 7


def test_draws_are_uniform_and_reproducible() -> None:
    drawn = Draws(0, torch.arange(4), 2000)
    many = torch.stack([drawn.of_key(1, 8, position) for position in range(2000)])
    assert many.min() >= 0 and many.max() < 1
    assert abs(many.mean().item() - 0.5) < 0.005
    assert torch.equal(
        Draws(2, torch.tensor([3]), 10).of_key(1, 8, 9), Draws(2, torch.arange(5), 20).of_key(1, 8, 9)[3:4]
    )
    assert not torch.equal(*(Draws(0, torch.arange(4), 4).of_key(seed, 8, 3) for seed in (1, 2)))


@pytest.mark.parametrize("windows", [(), (None, 3), (1, 7)])
@pytest.mark.parametrize("blocks", [[12], [5, 7], [1] * 12])
def test_a_block_of_keys_is_added_as_one_by_one(windows: tuple[int | None, ...], blocks: list[int]) -> None:
    shape = Shape(layers=(0, 1), heads=4, kv_heads=2, prompt=4, length=12, windows=windows)
    states = [
        CacheState.empty(shape, torch.full((1, 2, 2), 12), torch.zeros(1, 2, dtype=torch.int64), "cpu", torch.float32)
        for _ in range(2)
    ]
    start = 0
    for size in blocks:
        states[0].append_block(start, start + size)
        for t in range(start, start + size):
            states[1].append(t)
        start += size
        for name in ("alive", "n_alive", "leave"):
            assert torch.equal(getattr(states[0], name), getattr(states[1], name)), (name, start)

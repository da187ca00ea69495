"""A2SF against the sum of its equation, the published mask loop, and the sets the published codes decided."""

import pytest
import torch

import kvscope.policies.a2sf  # noqa: F401
from kvscope.core.errors import UsageError
from kvscope.policies.spec import parse_policies
from tests.engine.maps import attention, run
from tests.policies.decisions import LENGTH, golden, golden_simulation, heads_at, simulations
from tests.reference.policies import a2sf as reference

WIDE = [(1, 5), (4, 9), (9, 9), (17, 6), (LENGTH - 1, 4), (20, LENGTH), (3, LENGTH - 1)]  # room for 1 sink and 2 recent


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 1.0])
def test_decisions_equal_the_equation(prefill: str, alpha: float) -> None:
    for rows, visible, held, prompt, budget in simulations(f"a2sf:alpha={alpha}", prefill):
        assert (visible, held) == reference.drop(rows, budget, prompt, prefill, alpha=alpha)


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("reduce", ["scores", "rows"])
@pytest.mark.parametrize("group", ["max", "sum"])
def test_sinks_recent_and_groups(prefill: str, group: str, reduce: str) -> None:
    spec = f"a2sf:alpha=0.5,sinks=1,recent=2,group={group},reduce={reduce}"
    for rows, visible, held, prompt, budget in simulations(spec, prefill, WIDE):
        assert (visible, held) == reference.drop(
            rows, budget, prompt, prefill, alpha=0.5, sinks=1, recent=2, group=group, reduce=reduce
        )


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("group", ["mean", "max"])
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_lifetime_divides_by_the_rows_that_saw_the_key(prefill: str, alpha: float, group: str) -> None:
    differs = 0
    plain = simulations(f"a2sf:alpha={alpha},group={group}", prefill)
    for (rows, visible, held, prompt, budget), usual in zip(
        simulations(f"a2sf:alpha={alpha},normalise=lifetime,group={group}", prefill), plain, strict=True
    ):
        expected = reference.drop(rows, budget, prompt, prefill, alpha=alpha, group=group, lifetime=True)
        assert (visible, held) == expected
        differs += held != usual[2]
    assert differs > 0


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
@pytest.mark.parametrize(("streaming", "recent"), [(0, 0), (1, 0), (0, 2), (1, 2)])
def test_streaming_mask_equals_the_published_loop(alpha: float, streaming: int, recent: int) -> None:
    spec = f"a2sf:variant=streaming-mask,alpha={alpha},sinks={streaming},recent={recent}"
    for rows, visible, _, _, budget in simulations(spec, "stream", WIDE):
        assert visible == reference.mask(rows, streaming, budget - streaming - recent, recent, alpha)


@pytest.mark.parametrize(("alpha", "select", "recent"), [(0.2, 6, 0), (0.0, 6, 0), (1.0, 3, 3)])
def test_streaming_mask_golden(alpha: float, select: int, recent: int) -> None:
    expected = golden("a2sf", "streaming", alpha=alpha, select=select)
    spec = f"a2sf:variant=streaming-mask,alpha={alpha},recent={recent}"
    simulation = golden_simulation(spec, 6, "stream")
    for step, keys in expected["visible"].items():
        assert heads_at(simulation.visible(0, 20), int(step)) == keys


def test_real_drop_golden() -> None:
    expected = golden("a2sf", "real drop")
    held = golden_simulation("a2sf:alpha=0.2", 6, "full").held(0, 20)
    assert heads_at(held, 11) == expected["cache_after_prefill"]
    assert heads_at(held, 19) == expected["cache_final"]


def test_lifetime_of_a_plain_sum_is_the_mean_since_arrival() -> None:
    """The score of kvpress's ObservedAttention, on one head: column sums over the rows that could see the key."""
    rows = attention(11, 1, 1, 24)[0, 0]
    policy = parse_policies(["a2sf:alpha=1,normalise=lifetime"])[0]
    simulation = run(policy, rows[None, None], [8], kv_heads=1, prompt=24, prefill="full")
    means = rows.sum(0) / torch.arange(24, 0, -1)
    kept = simulation.held(0, 24)[0, 0, 0, 23].nonzero().flatten()
    assert kept.tolist() == means.topk(8).indices.sort().values.tolist()


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be used with variant=streaming-mask"):
        parse_policies(["a2sf:variant=streaming-mask,normalise=lifetime"])
    for setting in ("alpha=1.1", "recent=-1", "sinks=-1"):
        with pytest.raises(UsageError, match="out of range"):
            parse_policies([f"a2sf:{setting}"])
    mask = parse_policies(["a2sf:variant=streaming-mask"])[0]
    assert mask.traits.published
    with pytest.raises(UsageError, match="not defined for full prefill"):
        run(mask, attention(1, 1, 2, 12), [5], kv_heads=2, prompt=10, prefill="full")

"""A layer that decides as one: as if its query heads shared one key/value head, in every stepper."""

import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.engine.deciding import decided, why_not_by_layer
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Block, Shape
from kvscope.engine.simulation import CacheSimulation
from kvscope.policies.spec import parse_policy
from kvscope.policies.tuned import Tuned
from tests.engine.maps import attention, run, signals
from tests.policies.test_contract import BUDGET, LENGTH, PROMPT, SPECS, budget, goes

HEADS = 4


def published(spec: str) -> EvictionPlan:
    return EvictionPlan.published(parse_policy(spec))


ABLE = [spec for spec in SPECS if published(spec).decides == "kv_head" and why_not_by_layer(published(spec)) is None]


def test_most_policies_can() -> None:
    assert {"h2o", "a2sf", "snapkv", "cake", "morphkv", "roco", "scissorhands", "keyformer", "random"} <= set(ABLE)


PAIRS = [(spec, prefill) for spec in ABLE for prefill in ("full", "stream") if goes(published(spec), prefill)]


COARSE = ("raas", "chunkkv:scope=kv_head")  # pages and chunks as long as this text are the same in all heads


@pytest.mark.parametrize(("spec", "prefill"), PAIRS)
def test_it_decides_as_one_head_that_all_read(spec: str, prefill: str) -> None:
    plan, rows = published(spec), attention(3, 2, HEADS, LENGTH)
    how = {"prompt": PROMPT, "prefill": prefill}
    layer = decided(plan, "layer")
    together = run(layer, rows, [budget(spec)], kv_heads=HEADS, **how)
    shared = run(plan if layer.scope else layer, rows, [budget(spec)], kv_heads=1, **how)
    assert layer.decides == "layer" and together.held(0, LENGTH).shape[2] == HEADS
    assert torch.equal(together.held(0, LENGTH), shared.held(0, LENGTH).expand(-1, -1, HEADS, -1, -1))
    single = run(decided(plan, "kv_head"), rows, [budget(spec)], kv_heads=HEADS, **how)
    if spec not in ("belady", *COARSE) and "group" in plan.policy.parameters():
        assert not torch.equal(together.held(0, LENGTH), single.held(0, LENGTH)), "heads keep different keys"


@pytest.mark.parametrize("spec", ["h2o", "a2sf:group=max", "h2o:group=sum", "tova:scope=kv_head", "random", "lru"])
@pytest.mark.parametrize("heads", [4, 32])
def test_kernels_decide_the_same(spec: str, heads: int) -> None:
    layer = decided(published(spec), "layer")
    rows = attention(5, 2, heads, LENGTH).float()
    shape = Shape((0, 1), heads, heads, PROMPT, LENGTH)
    given = signals(layer, 2, heads, heads, LENGTH)
    one, other = (CacheSimulation(layer, [BUDGET, 20], shape, "full", given) for _ in range(2))
    one.block(Block(rows, 0))
    for t in range(LENGTH):
        other.step(t, rows[:, :, t, : t + 1])
    assert torch.equal(one.state.leave, other.state.leave) and one.state.leave.shape[2] == 1


def test_what_cannot_says_why_and_stays_by_default() -> None:
    for spec, why in (
        ("keydiff", "it reads keys of each key/value head"),
        ("vatp", "it reads value_l1 of each key/value head"),
        ("ada-kv", "allocation ada gives each head its own budget"),
        ("quest", "it holds every key, and reads some"),
    ):
        plan = published(spec)
        assert why_not_by_layer(plan) == why and decided(plan, latent=True) == plan
        with pytest.raises(UsageError, match=f"--scope layer cannot be used with {spec}: {why}"):
            decided(plan, "layer")
    heads = Tuned("a.toml", (parse_policy("a2sf:alpha=0.1"), parse_policy("a2sf:alpha=0.9")), (0,), ((0, 1),))
    assert why_not_by_layer(EvictionPlan.published(heads)) == "its heads have settings of their own"


def test_the_default_is_for_latent_caches_alone() -> None:
    assert decided(published("h2o")) == published("h2o")
    assert decided(published("h2o"), latent=True).label == "h2o [per layer]"
    assert decided(published("h2o"), "kv_head", latent=True) == published("h2o")
    assert decided(published("tova:scope=kv_head"), latent=True) == published("tova:scope=kv_head")
    assert decided(published("tova"), "kv_head") == published("tova:scope=kv_head")
    assert decided(published("belady"), latent=True) == published("belady:scope=layer")
    assert decided(published("window"), "layer") == published("window")

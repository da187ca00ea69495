"""The Triton kernel beside the torch fallback: the same evictions, in registers and in tiles.

Where there is no GPU it runs in Triton's interpreter, on shapes that are small because that is slow.
"""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvscope.core.errors import ReplayError
from kvscope.engine.deciding import decided
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Block, Shape
from kvscope.engine.simulation import CacheSimulation
from kvscope.kernels import triton_available
from kvscope.policies.base import recurrence_of
from kvscope.policies.spec import parse_policies
from tests.engine.maps import KINDS, attention, signals

pytestmark = pytest.mark.skipif(not triton_available(), reason="triton is not installed: pip install triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPECS = [
    "h2o",
    "h2o:group=max,reduce=rows",
    "a2sf:alpha=0.93,group=sum,recent=2",
    "tova",
    "tova:scope=kv_head,group=max",
    "window",
    "streaming-llm:sinks=2",
    "key-norm",
    "random:seed=3",
    "vatp",
    "vatp:base=a2sf,norm=l2",
]
REGISTERS, TILES = 8192, 16


def stepped(
    plan: EvictionPlan,
    rows: Tensor,
    blocks: list[int],
    most_keys: int | None,
    *,
    kv_heads: int,
    prompt: int,
    prefill: str,
    budgets: list[int],
    windows: tuple[int | None, ...] = (),
    missing: Tensor | None = None,
) -> CacheSimulation:
    """Return a simulation stepped block by block: by Triton up to so many keys in registers, or by torch."""
    from kvscope.engine.triton_stepper import TritonStepper

    layers, heads, length = rows.shape[-4:-1]
    shape = Shape(tuple(range(layers)), heads, kv_heads, prompt, length, windows=windows)
    known = {
        name: value.to(DEVICE, rows.dtype) for name, value in signals(plan, layers, heads, kv_heads, length).items()
    }
    simulation = CacheSimulation(
        plan,
        budgets,
        shape,
        prefill,
        known,
        missing_mass=missing,
        dtype=rows.dtype,
        device=DEVICE,  # type: ignore[arg-type]
    )
    rule = recurrence_of(plan.policy)
    assert rule is not None
    if most_keys is None:
        simulation.stepper = simulation._torch
    else:
        simulation.stepper = TritonStepper(simulation.inputs, simulation.state, rule, most_keys=most_keys)
    simulation.block = simulation.stepper.step_block
    for start, stop in zip([0, *blocks], [*blocks, length], strict=True):
        lost = None if missing is None else missing[..., start:stop]
        simulation.block(Block(rows[..., start:stop, :stop].to(DEVICE), start, lost))
    simulation.check()
    return simulation


def same(one: CacheSimulation, other: CacheSimulation) -> None:
    for name in ("alive", "leave", "n_alive", "evictions"):
        assert torch.equal(getattr(one.state, name), getattr(other.state, name)), name
    assert torch.equal(one.state.length_at_eviction, other.state.length_at_eviction)
    alive = one.state.alive
    assert torch.allclose(one.state.score[alive], other.state.score[alive], rtol=1e-5, atol=0)


@pytest.mark.parametrize("most_keys", [REGISTERS, TILES])
@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=2, deadline=None, phases=[Phase.generate])  # a failing case takes minutes to shrink
@given(st.integers(0, 999), KINDS, st.integers(2, 24), st.sampled_from([1, 2, 4]), st.booleans(), st.data())
def test_the_same_keys_are_evicted(
    spec: str, most_keys: int, seed: int, kind: str, length: int, kv_heads: int, exact: bool, data: st.DataObject
) -> None:
    rows = attention(seed, 1, 4, length, kind).to(torch.float64 if exact else torch.float32)
    blocks = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=1)))
    prefill = data.draw(st.sampled_from(["full", "stream"]))
    prompt = data.draw(st.integers(1, length))
    budgets = data.draw(st.lists(st.integers(4, length + 2), min_size=1, max_size=2))
    plan = EvictionPlan.published(parse_policies([spec])[0])
    how = {"kv_heads": kv_heads, "prompt": prompt, "prefill": prefill, "budgets": budgets}
    same(*(stepped(plan, rows, blocks, most, **how) for most in (most_keys, None)))


@pytest.mark.slow
@pytest.mark.parametrize("most_keys", [REGISTERS, TILES])
@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("spec", ["h2o", "vatp"])
def test_windows_sinks_and_rows_of_their_own(spec: str, prefill: str, most_keys: int) -> None:
    rows = torch.stack([attention(seed, 2, 4, 24, "half").float() for seed in (1, 2)])  # [R, L, H, T, T]
    rows[:, 1] = rows[:, 1].triu(-8)  # the second layer sees nine keys
    missing = torch.rand(2, 2, 4, 24, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    plan = EvictionPlan.published(parse_policies([spec])[0])
    how = {"kv_heads": 2, "prompt": 12, "prefill": prefill, "budgets": [5, 7], "missing": missing}
    same(*(stepped(plan, rows, [13], most, windows=(None, 9), **how) for most in (most_keys, None)))


@pytest.mark.slow
@pytest.mark.parametrize("most_keys", [REGISTERS, TILES])
@pytest.mark.parametrize("compress", ["prefill", "every:3"])
def test_phases_evict_several_keys_at_once(compress: str, most_keys: int) -> None:
    plan = EvictionPlan.make(parse_policies(["h2o"])[0], compress=compress)
    rows = attention(5, 1, 4, 26).float()
    how = {"kv_heads": 2, "prompt": 16, "prefill": "full", "budgets": [6, 12]}
    same(*(stepped(plan, rows, [], most, **how) for most in (most_keys, None)))


@pytest.mark.parametrize("most_keys", [REGISTERS, TILES])
@pytest.mark.parametrize("heads", [4, 32])
def test_a_layer_that_decides_as_one(heads: int, most_keys: int) -> None:
    plan = decided(EvictionPlan.published(parse_policies(["h2o"])[0]), "layer")
    how = {"kv_heads": heads, "prompt": 9, "prefill": "full", "budgets": [6, 12]}
    one, other = (stepped(plan, attention(5, 1, heads, 26).float(), [13], most, **how) for most in (most_keys, None))
    assert one.state.leave.shape[2] == 1
    same(one, other)


@pytest.mark.parametrize("most_keys", [REGISTERS, TILES])
def test_uneven_budgets(most_keys: int) -> None:
    plan = EvictionPlan.make(parse_policies(["a2sf"])[0], allocate="pyramid")
    rows = attention(5, 3, 2, 24).float()
    how = {"kv_heads": 1, "prompt": 16, "prefill": "full", "budgets": [8]}
    one, other = (stepped(plan, rows, [], most, **how) for most in (most_keys, None))
    assert len(one.state.budget.unique()) > 1
    same(one, other)


@pytest.mark.parametrize("most_keys", [REGISTERS, TILES])
def test_weights_that_are_no_numbers_are_found(most_keys: int) -> None:
    rows = attention(1, 1, 2, 12).float()
    rows[0, 1, 7, 7] = torch.nan
    plan = EvictionPlan.published(parse_policies(["h2o"])[0])
    with pytest.raises(ReplayError, match="not numbers"):
        stepped(plan, rows, [], most_keys, kv_heads=1, prompt=1, prefill="stream", budgets=[4])

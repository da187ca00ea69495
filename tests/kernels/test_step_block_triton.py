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


def counted(patch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Return a list that grows at each call of a function of `triton_bounds`, which a GPU could not count."""
    from kvscope.kernels import triton_bounds

    function, calls = getattr(triton_bounds, name), list[int]()

    def count(*args: object) -> object:
        calls.append(1)
        return function(*args)

    patch.setattr(triton_bounds, name, count)
    return calls


def rows_of_kind(seed: int, heads: int, length: int, kind: str) -> Tensor:
    """Return rows in float32: as `attention`, nearly equal weights, or weights of which most are next to nothing."""
    if kind == "flat":
        return torch.softmax(attention(seed, 1, heads, length).log().div(100), -1).float()
    if kind in ("tiny", "steep"):
        rows = attention(seed, 1, heads, length) ** (30 if kind == "tiny" else 8)
        return (rows if kind == "tiny" else rows / rows.sum(-1, keepdim=True)).float()
    return attention(seed, 1, heads, length, kind).float()


@settings(max_examples=12, deadline=None, phases=[Phase.generate])
@given(st.integers(0, 999), st.sampled_from(["smooth", "ties", "sparse", "half", "flat", "tiny", "steep"]), st.data())
def test_the_same_keys_are_evicted_by_bounds(seed: int, kind: str, data: st.DataObject) -> None:
    from kvscope.kernels import step_block_triton, triton_bounds

    kv_heads, length = data.draw(st.sampled_from([1, 2])), data.draw(st.integers(8, 40))
    heads = kv_heads * data.draw(st.sampled_from([2, 3, 8]))
    spec = data.draw(st.sampled_from(["tova", "tova:scope=kv_head", "tova:scope=kv_head,group=max"]))
    plan = EvictionPlan.published(parse_policies([spec])[0])
    lost = data.draw(st.sampled_from([None, torch.rand(1, heads, length, generator=torch.Generator().manual_seed(1))]))
    how = {
        "kv_heads": kv_heads,
        "prompt": data.draw(st.integers(1, length)),
        "prefill": data.draw(st.sampled_from(["full", "stream"])),
        "budgets": data.draw(st.lists(st.integers(4, length // 2), min_size=1, max_size=2)),
        "missing": None if lost is None else lost.to(DEVICE),
    }
    blocks = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_block_triton, "FEWEST_HEADS", 2)
        patch.setattr(step_block_triton, "STEPS_BY_BOUNDS", data.draw(st.sampled_from([2, 8, 64])))
        if DEVICE == "cpu":
            patch.setattr(triton_bounds, "TRIES", data.draw(st.sampled_from([1, 3, 32])))
        rows = rows_of_kind(seed, heads, length, kind)
        same(*(stepped(plan, rows, blocks, most, **how) for most in (REGISTERS, None)))


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter can be counted in")
@pytest.mark.parametrize("kind", ["smooth", "ties", "flat"])
def test_few_scores_are_computed(kind: str) -> None:
    plan = EvictionPlan.published(parse_policies(["tova"])[0])
    rows = rows_of_kind(3, 8, 40, kind)
    with pytest.MonkeyPatch.context() as patch:
        every, keys = counted(patch, "_all_scores"), counted(patch, "rounded_quotient")
        stepped(plan, rows, [], REGISTERS, kv_heads=8, prompt=1, prefill="stream", budgets=[20])
    assert len(every) == 1, "only the scores that the last step leaves"
    assert 19 <= len(keys) <= 19 * 6, "one to six keys at each of the other steps that evict"


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter can be counted in")
def test_bounds_decide_from_the_step_after_a_prompt() -> None:
    """All scores are computed at the end of the prompt, where eight keys go, and at the last step."""
    plan = EvictionPlan.published(parse_policies(["tova"])[0])
    rows = rows_of_kind(3, 8, 40, "smooth")
    with pytest.MonkeyPatch.context() as patch:
        every, by_bounds = counted(patch, "_all_scores"), counted(patch, "_lowest")
        one = stepped(plan, rows, [], REGISTERS, kv_heads=8, prompt=20, prefill="full", budgets=[12])
    assert (len(every), len(by_bounds)) == (2, 19)
    same(one, stepped(plan, rows, [], None, kv_heads=8, prompt=20, prefill="full", budgets=[12]))


@pytest.mark.parametrize("position", [2, 7])
@pytest.mark.parametrize("head", [0, 7])
def test_weights_that_are_no_numbers_are_found_by_bounds(head: int, position: int) -> None:
    """At a step that evicts, and at an earlier one: a score that is not a number remains one."""
    rows = attention(1, 1, 8, 12).float()
    rows[0, head, position, position] = torch.nan
    plan = EvictionPlan.published(parse_policies(["tova"])[0])
    with pytest.raises(ReplayError, match="not numbers"):
        stepped(plan, rows, [9], REGISTERS, kv_heads=8, prompt=1, prefill="stream", budgets=[4])


@pytest.mark.parametrize("seed", range(3))
def test_bounds_after_a_step_that_evicts_several_keys(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one part of the block, without an edge at the end of the prompt."""
    from kvscope.kernels import step_block_triton

    monkeypatch.setattr(step_block_triton, "_edges", lambda steps, _: [0, steps])
    plan = EvictionPlan.published(parse_policies(["tova"])[0])
    how = {"kv_heads": 8, "prompt": 20, "prefill": "full", "budgets": [5, 9]}
    rows = rows_of_kind(seed, 8, 30, "steep")
    same(*(stepped(plan, rows, [], most, **how) for most in (REGISTERS, None)))


def evicted_by_bounds(rows: list[list[list[float]]], budget: int) -> list[int]:
    """Return the keys that TOVA evicts over rows ``[H][T][t + 1]``, in order; all heads decide together."""
    length = len(rows[0])
    full = torch.tensor([[[*row, *[0.0] * (length - len(row))] for row in head] for head in rows])[None]
    plan = EvictionPlan.published(parse_policies(["tova"])[0])
    how = {"kv_heads": len(rows), "prompt": 1, "prefill": "stream", "budgets": [budget]}
    after = [[0.25] * (length + 1)] * len(rows)  # one more step: all scores are computed at the last one
    full = torch.nn.functional.pad(full, (0, 1, 0, 1))
    full[0, :, -1] = torch.tensor(after)
    leave = stepped(plan, full, [], REGISTERS, **how).state.leave[0, 0, 0].tolist()
    gone = sorted((step, key) for key, step in enumerate(leave) if step < length)
    return [key for _, key in gone]


@pytest.fixture
def two_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvscope.kernels import step_block_triton

    monkeypatch.setattr(step_block_triton, "FEWEST_HEADS", 2)


@pytest.mark.usefixtures("two_heads")
def test_the_older_key_of_equal_scores_leaves_although_its_bound_is_higher() -> None:
    """Key 0 leaves first; then keys 1 and 2 have the score 0.6, with bounds of 0.51 and 0.42."""
    start = [[1.0], [0.5, 0.5], [0.2, 0.4, 0.4], [0.1, 0.3, 0.3, 0.3]]
    one, other = [*start, [0.5, 0.125, 0.25, 0.5, 0.25]], [*start, [0.0, 0.25, 0.125, 0.5, 0.25]]
    assert evicted_by_bounds([one, other], 3) == [0, 1]


@pytest.mark.usefixtures("two_heads")
def test_a_row_that_had_nearly_all_its_mass_on_evicted_keys() -> None:
    """In double, 1 + 1e-17 - 1 is 0. Key 1 has the lowest score, 0.1 + 0.24, and key 2 without the first row."""
    start = [[1.0], [0.5, 0.5], [0.2, 0.4, 0.4], [0.1, 0.3, 0.3, 0.3]]
    one, other = [*start, [1.0, 1e-18, 3e-18, 3e-18, 3e-18]], [*start, [0.0, 0.24, 0.2, 0.28, 0.28]]
    assert evicted_by_bounds([one, other], 3) == [0, 1]


@pytest.mark.parametrize("seed", [7, 9, 10, 11])  # of which the bound of the oldest key, in 32 bit, is rounded up
def test_bounds_are_below_scores_that_are_rounded_otherwise(seed: int) -> None:
    """Eight keys have the same weights, each in another order of the heads, and so equal scores: the oldest leaves."""
    weights = torch.rand(8, generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [[[1.0] * (step + 1) for step in range(8)] for _ in range(8)]
    for head in range(8):
        rows[head].append([*(weights[(head + key) % 8] for key in range(8)), 1.0])
    assert evicted_by_bounds(rows, 8) == [0]

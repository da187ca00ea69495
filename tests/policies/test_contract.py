"""What every registered policy promises, whatever its rule, in every phase and allocation that goes with it.

A new policy is tested by being registered; a `variant` or `schedule` with choices is tested in each of them.
"""

from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from kvscope.core.errors import UsageError
from kvscope.engine.allocation import ALLOCATORS
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.signal_axes import WITHOUT_HEADS
from kvscope.engine.simulation import CacheSimulation
from kvscope.policies import POLICIES
from kvscope.policies.base import Policy
from kvscope.policies.describe import describe
from kvscope.policies.parameters import all_parameters_of
from kvscope.policies.spec import parse_policies
from tests.engine.maps import attention, run, signals

PREFILLS = ["full", "stream"]
LENGTH, PROMPT, BUDGET = 49, 20, 12
CHOICES = ("variant", "schedule", "base", "scope")  # parameters whose every value is a rule of its own
BASES = ("h2o", "tova", "a2sf", "scissorhands")
SMALL = {
    "dms": "dms:window=5",  # whose usual sizes exceed the whole text
    "quest": "quest:page_size=2,skip_layers=0",  # three pages of the usual size are the whole text here
    "simlayerkv": "simlayerkv:recent=6,sinks=2,threshold=0.4",
    "duo-attention": "duo-attention:recent=6,sinks=2,threshold=0.6",
}
ROOMY = {"roco:variant=easykv": 30, "h2o:variant=flexgen": 13}  # holds the whole prompt; holds odd numbers


def specs() -> Iterator[str]:
    for name, cls in POLICIES.items():
        yield SMALL.get(name, name)
        for field, kind in all_parameters_of(cls).values():
            if field.name in CHOICES:
                values = BASES if field.name == "base" else get_args(kind)
                yield from (f"{name}:{field.name}={value}" for value in values if value not in (field.default, None))


def plan(spec: str) -> EvictionPlan:
    return EvictionPlan.published(parse_policies([spec])[0])


def budget(spec: str) -> int:
    return ROOMY.get(spec, BUDGET)


def goes(made: EvictionPlan, prefill: str) -> bool:
    try:
        made.require(prefill)
    except UsageError:
        return False
    return True


def over(made: EvictionPlan, rows: Tensor, keys: list[int], prefill: str) -> CacheSimulation:
    return run(made, rows, keys, kv_heads=2, prompt=PROMPT, prefill=prefill)


@cache
def simulated(spec: str, prefill: str, keys: int = 0) -> CacheSimulation:
    """Return the simulation of a policy over `ROWS`, under its usual budget if `keys` is 0; no test changes it."""
    return over(plan(spec), ROWS, [keys or budget(spec)], prefill)


@lru_cache(maxsize=8)
def of_three_layers(made: EvictionPlan, keys: int) -> CacheSimulation:
    """Return the simulation of a plan, the same for all choices that make the same plan."""
    return over(made, attention(10, 3, 4, LENGTH), [keys], "full" if goes(made, "full") else "stream")


ROWS = attention(1, 2, 4, LENGTH)
SPECS = list(specs())
PAIRS = [(spec, prefill) for spec, prefill in product(SPECS, PREFILLS) if goes(plan(spec), prefill)]
BOUNDED = [(s, p) for s, p in PAIRS if plan(s).policy.traits.bounded and not plan(s).policy.traits.reads]
EVERY_STEP = [(s, p) for s, p in BOUNDED if plan(s).phase == "step"]
BOUNDS = [(s, p) for s, p in PAIRS if plan(s).policy.traits.clairvoyant]
READERS = [(s, p) for s, p in PAIRS if plan(s).policy.traits.reads]


def test_every_policy_runs_under_some_prefill() -> None:
    assert {spec for spec, _ in PAIRS} == set(SPECS)
    assert len(EVERY_STEP) > 20 and len(READERS) > 3 and len(BOUNDS) > 3


@pytest.mark.parametrize(("spec", "prefill"), EVERY_STEP)
def test_budget_is_kept_at_every_step(spec: str, prefill: str) -> None:
    simulation = simulated(spec, prefill)
    held = simulation.held(0, LENGTH).sum(-1)
    first = PROMPT - 1 if prefill == "full" else 0
    assert held[..., first:].max() == budget(spec)
    assert (simulation.visible(0, LENGTH).sum(-1)[..., first + 1 :] <= budget(spec) + 1).all()


@pytest.mark.parametrize(("spec", "prefill"), BOUNDED)
def test_budget_is_kept_where_the_phase_says_so(spec: str, prefill: str) -> None:
    made, simulation = plan(spec), simulated(spec, prefill)
    held = simulation.held(0, LENGTH).sum(-1)  # [R, L, G, T]
    for t in range(LENGTH):
        before = held[..., t - 1] if t else torch.zeros_like(held[..., 0])
        if made.compresses(t, PROMPT, prefill):
            assert (held[..., t] <= simulation.state.budget).all() and (held[..., t] <= before + 1).all()
        else:
            assert torch.equal(held[..., t], before + 1)


@pytest.mark.parametrize(("spec", "prefill"), READERS)
def test_a_reader_holds_everything_and_reads_its_budget(spec: str, prefill: str) -> None:
    kind = "sparse" if "selection" in plan(spec).needs else "smooth"  # the model itself gave others no weight
    simulation = run(plan(spec), attention(1, 2, 4, LENGTH, kind), [BUDGET], kv_heads=2, prompt=PROMPT, prefill=prefill)
    assert torch.equal(simulation.held(0, LENGTH)[0, 0, 0], torch.ones(LENGTH, LENGTH).tril().bool())
    seen = simulation.visible(0, LENGTH)
    assert seen.diagonal(dim1=-2, dim2=-1).all(), "the current key is always read"
    assert (seen.sum(-1) < torch.arange(1, LENGTH + 1)).any()


@pytest.mark.parametrize(("spec", "prefill"), [pair for pair in PAIRS if pair not in READERS])
def test_nothing_comes_back(spec: str, prefill: str) -> None:
    held = simulated(spec, prefill).held(0, LENGTH)
    before, after = held[..., :-1, :], held[..., 1:, :]
    new = after & ~before
    keys = new.nonzero()
    assert (keys[:, -1] == keys[:, -2] + 1).all(), "only the current key may be new"


@pytest.mark.parametrize(("spec", "prefill"), BOUNDED)
def test_protected_keys_stay(spec: str, prefill: str) -> None:
    made = plan(spec)
    protection = made.policy.protect(budget(spec))
    sinks = PROMPT if protection.prompt else protection.sinks
    held = simulated(spec, prefill).held(0, LENGTH)
    for t in range(LENGTH):
        assert held[..., t, : min(sinks, t + 1)].all()
        if made.compresses(t, PROMPT, prefill):
            assert held[..., t, max(t + 1 - protection.recent, 0) : t + 1].all()


@pytest.mark.parametrize(("spec", "prefill"), [p for p in PAIRS if plan(p[0]).policy.traits.bounded])
def test_a_budget_of_the_whole_length_is_the_full_cache(spec: str, prefill: str) -> None:
    simulation = over(plan(spec), ROWS, [LENGTH, LENGTH + 6], prefill)
    full = simulated("full", prefill, LENGTH)
    assert torch.equal(simulation.visible(0, LENGTH)[:1], full.visible(0, LENGTH))
    assert (simulation.state.evictions == 0).all()


@pytest.mark.parametrize(("spec", "prefill"), [p for p in PAIRS if p not in BOUNDS])
def test_the_future_changes_nothing_before_it(spec: str, prefill: str) -> None:
    if "released" in spec:
        pytest.fail("decided by the length of the text") if prefill == "full" else None
    cut = 33
    part = over(plan(spec), ROWS[..., :cut, :cut], [budget(spec)], prefill)
    assert torch.equal(simulated(spec, prefill).visible(0, cut), part.visible(0, cut))


@pytest.mark.parametrize(("spec", "prefill"), PAIRS)
def test_what_a_query_sees_is_settled_before_its_row(spec: str, prefill: str) -> None:
    """With other rows from `cut` on, what queries up to `cut` see is the same; for a bound it must not be."""
    cut = 33
    other = ROWS.clone()
    other[..., cut:, :] = attention(12, 2, 4, LENGTH)[..., cut:, :]
    one, changed = simulated(spec, prefill), over(plan(spec), other, [budget(spec)], prefill)
    assert torch.equal(one.visible(0, cut + 1), changed.visible(0, cut + 1)) != ((spec, prefill) in BOUNDS)


@pytest.mark.parametrize(("spec", "prefill"), PAIRS)
def test_the_same_twice_and_alone(spec: str, prefill: str) -> None:
    """State that leaks from one sequence to the next would change the second run."""
    made = plan(spec)
    over(made, attention(6, 2, 4, LENGTH), [budget(spec)], prefill)
    after = over(made, ROWS, [budget(spec)], prefill)
    assert torch.equal(simulated(spec, prefill).visible(0, LENGTH), after.visible(0, LENGTH))


@pytest.mark.parametrize(("spec", "prefill"), PAIRS)
def test_budgets_side_by_side_do_not_mix(spec: str, prefill: str) -> None:
    more = budget(spec) + 6
    both = over(plan(spec), ROWS, [budget(spec), more], prefill)
    for index, alone in enumerate([simulated(spec, prefill), over(plan(spec), ROWS, [more], prefill)]):
        assert torch.equal(both.visible(0, LENGTH)[index], alone.visible(0, LENGTH)[0])


@pytest.mark.parametrize(("spec", "prefill"), [p for p in PAIRS if not {"random", "keyformer"} & {p[0].split(":")[0]}])
def test_swapping_heads_swaps_the_result(spec: str, prefill: str) -> None:
    """Policies that draw by head number are the only ones whose heads are not interchangeable."""
    made, rows = plan(spec), attention(8, 1, 4, LENGTH)
    given = signals(made, 1, 4, 4, LENGTH)
    order = [2, 0, 3, 1]
    moved = {name: value if name in WITHOUT_HEADS else value[:, order] for name, value in given.items()}
    at = {"kv_heads": 4, "prompt": PROMPT, "prefill": prefill}
    one = run(made, rows, [budget(spec)], given=given, **at)
    swapped = run(made, rows[:, order], [budget(spec)], given=moved, **at)
    assert torch.equal(one.visible(0, LENGTH)[:, :, order], swapped.visible(0, LENGTH))


PHASES = ["prefill", "step", "every:5"]


@pytest.mark.parametrize(
    ("spec", "phase", "allocate"), list(product(SPECS, PHASES, ALLOCATORS.names())), ids=lambda value: str(value)
)
def test_every_phase_and_allocation_runs_or_says_why_not(spec: str, phase: str, allocate: str) -> None:
    policy = parse_policies([spec])[0]
    fixed = policy.traits.reads or policy.traits.published or policy.traits.clairvoyant or not policy.traits.bounded
    free = policy.traits.phase != "none" and not fixed
    per_layer = policy.traits.scope == "layer" and ALLOCATORS.get(allocate).spans == "heads"
    if policy.traits.phase != "none" and (not free or per_layer):
        with pytest.raises(UsageError):
            EvictionPlan.make(policy, phase, allocate)
        return
    made = EvictionPlan.make(policy, phase, allocate)
    simulation = of_three_layers(made, budget(spec))
    shares = simulation.state.budget
    assert int(shares.sum()) == budget(spec) * shares.numel(), "the total is conserved"
    held = simulation.held(0, LENGTH).sum(-1)  # [R, L, G, T]
    kept = shares if shares.shape[-1] == 2 else shares.expand(-1, -1, 2)
    if free and simulation.inputs.prefill == "full":
        assert (held[..., PROMPT - 1] == kept.clamp(max=PROMPT)).all()


def describing() -> list[str]:
    return POLICIES.names()


@pytest.mark.parametrize("name", describing())
def test_every_policy_describes_itself(name: str) -> None:
    (row,) = describe(name)
    assert row["summary"].endswith(".") and row["paper"]
    assert all(parameter["help"] for parameter in row["parameters"])


@pytest.mark.parametrize("name", describing())
def test_the_label_is_a_record(name: str) -> None:
    made: Policy = parse_policies([name])[0]
    assert made.label == name

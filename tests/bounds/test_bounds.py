"""Bounds: optimal with proof, above every policy in a replay, and refused with choices that are no bound."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from kvscope.bounds import matching
from kvscope.bounds import schedules as module
from kvscope.bounds.matching import match
from kvscope.bounds.schedules import Schedules, schedules
from kvscope.core.errors import UsageError
from kvscope.core.options import PlanOptions, ReplayOptions
from kvscope.core.summary_records import BoundShares
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Shape
from kvscope.policies import POLICIES
from kvscope.policies.spec import parse_policy
from kvscope.replay.compile import compile_replay
from kvscope.replay.run import replay
from kvscope.results.store import Replay
from kvscope.results.summary import bounds as shares
from kvscope.trace.reader import Trace, open_trace
from tests.engine.maps import KINDS, attention

EXAMPLE = Path(__file__).parents[2] / "traces" / "example"


def require_certificate(found: matching.Matching, cost: np.ndarray, room: np.ndarray) -> None:
    """Fail unless the assignment is valid and its prices prove that none is cheaper."""
    keys = np.arange(cost.shape[1])
    assert (np.bincount(found.slot, minlength=len(room)) == room).all()
    assert found.cost == pytest.approx(cost[found.slot, keys].sum(), rel=1e-12)
    assert (found.slot_price[:, None] + found.key_price <= cost + 1e-12).all(), "a price is too high"
    assert found.bound == pytest.approx(found.slot_price @ room + found.key_price.sum(), rel=1e-12)
    assert abs(found.cost - found.bound) < 1e-9, "the prices prove less than what was found"


def eviction(rows: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cost and room of the schedule of one head with streaming prefill, from plain loops."""
    length = len(rows)
    cost = np.zeros((length - budget, length))
    for slot, t in enumerate(range(budget, length - 1)):
        for key in range(length):
            cost[slot, key] = rows[max(t, key) + 1 :, key].sum() if key <= t else np.inf
    return cost, np.array([*[1] * (length - budget - 1), budget + 1])


@pytest.mark.parametrize("kind", ["smooth", "ties", "sparse", "half"])
@pytest.mark.parametrize("budget", [20, 100, 400])
def test_the_prices_prove_the_assignment_at_half_a_thousand_tokens(kind: str, budget: int) -> None:
    rows = attention(budget, 1, 1, 512, kind)[0, 0].numpy()
    cost, room = eviction(rows, budget)
    require_certificate(match(cost, room), cost, room)


@pytest.mark.parametrize("shape", ["alike", "nothing", "in turn", "backwards"])
def test_the_prices_prove_it_where_everything_ties(shape: str) -> None:
    length = 300
    t, k = np.meshgrid(np.arange(length), np.arange(length), indexing="ij")
    rows = {"alike": 1 / (t + 1), "nothing": t == k, "in turn": k == t % 17, "backwards": 1 / (k + 1.0)}[shape]
    cost, room = eviction(np.tril(rows.astype(float)), 60)
    require_certificate(match(cost, room), cost, room)


@given(seed=st.integers(0, 10_000), slots=st.integers(1, 24), wide=st.integers(1, 5), ties=st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_order_of_slots_and_any_room_is_assigned_as_scipy_does(seed, slots, wide, ties) -> None:
    random = np.random.default_rng(seed)
    room = random.integers(1, wide + 1, slots)
    cost = random.normal(size=(slots, int(room.sum())))
    cost = cost.round() if ties else cost
    found = match(cost, room)
    require_certificate(found, cost, room)
    each = np.repeat(cost, room, axis=0)
    assert found.cost == pytest.approx(each[linear_sum_assignment(each)].sum(), abs=1e-9)


def test_a_problem_without_an_assignment_is_an_error() -> None:
    with pytest.raises(ValueError, match="room for 3"):
        match(np.zeros((2, 4)), np.array([1, 2]))
    with pytest.raises(ValueError, match="no slot"):
        match(np.array([[np.inf, np.inf, 1.0], [np.inf, np.inf, 1.0], [0.0, 0.0, 0.0]]), np.array([1, 1, 1]))


@given(seed=st.integers(0, 1000), kind=KINDS, scope=st.sampled_from(["kv_head", "layer"]))
@settings(max_examples=10, deadline=None)
def test_reading_some_heads_at_a_time_changes_nothing(seed: int, kind: str, scope: Any) -> None:
    rows = attention(seed, 2, 6, 30, kind)
    shape = Shape((0, 1), 6, 3, 12, 30)

    def found(size: int) -> Schedules:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "BYTES", size)
            patch.setattr(module, "STEPS", 7)
            return schedules(lambda layer, a, b: rows[layer, :, a:b], shape, [4, 9, 40], "full", scope)

    one, many = found(1), found(2**30)
    assert torch.equal(one.leaves, many.leaves)
    assert np.array_equal(one.lost, many.lost)
    assert (many.leaves[2] == 30).all() and many.lost[2] == 0, "a budget of the whole sequence evicts nothing"


@pytest.fixture(scope="module")
def trace() -> Trace:
    """A trace of the bundled model."""
    return open_trace(EXAMPLE)


def stepping(prefill: str) -> list[str]:
    """Return the policies that by default hold no more than the budget after any step."""
    found = []
    for name, cls in POLICIES.items():
        traits = cls().traits
        bounded = traits.bounded and not traits.reads and not traits.clairvoyant
        if bounded and (traits.phase, traits.allocate) == ("step", "uniform") and prefill in traits.prefills:
            found.append(name)
    return found


@pytest.fixture(scope="module", params=["full", "stream"])
def replayed(request: pytest.FixtureRequest, trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> Replay:
    """A replay of the bounds and of every policy that evicts at every step."""
    names = ["ideal", "belady", "belady:scope=layer", "full", *stepping(request.param)]
    return replay(trace, names, "10%,30%", output=tmp_path_factory.mktemp("bounds") / "all", prefill=request.param)


def heads(made: Replay, policy: str, budget: str) -> np.ndarray:
    """Return the mean retained mass of every key/value head, ``[L, G]``."""
    number = next(run.run for run in made.info.runs if (run.label, run.budget) == (policy, budget))
    frame = made.fidelity(run=number).dropna(subset="retained_mass")
    per = made.info.trace.heads // made.info.trace.kv_heads
    mean = frame.groupby(["layer", frame["head"] // per])["retained_mass"].mean()
    return mean.unstack().to_numpy()


@pytest.mark.parametrize("budget", ["10%", "30%"])
def test_on_a_real_trace_the_bounds_are_above_every_policy_in_every_head(replayed: Replay, budget: str) -> None:
    ideal, belady, layer = (heads(replayed, name, budget) for name in ("ideal", "belady", "belady(scope=layer)"))
    assert (ideal >= belady - 1e-6).all()
    assert (belady.mean(1) >= layer.mean(1) - 1e-6).all()
    policies = stepping(replayed.info.prefill)
    assert len(policies) > 10 and {"h2o", "tova", "window", "a2sf"} <= set(policies)
    for name in policies:
        assert (belady >= heads(replayed, name, budget) - 1e-6).all(), name
    for name in ("tova", "window", "streaming-llm"):
        assert (layer.mean(1) >= heads(replayed, name, budget).mean(1) - 1e-6).all(), name
    assert (ideal - belady).mean() > 1e-3 and (belady - heads(replayed, "tova", budget)).mean() > 1e-3


def test_a_bound_says_what_it_is_and_that_it_is_exact(replayed: Replay) -> None:
    for run in replayed.info.runs:
        assert run.clairvoyant == (run.policy in ("ideal", "belady"))
        assert (run.certificate is not None) == (run.policy == "belady")
        if run.certificate is not None:
            assert run.certificate.exact is True
            assert 0 <= run.certificate.gap < 1e-10


def test_the_residency_of_a_bound_is_recorded_as_that_of_a_policy(replayed: Replay) -> None:
    run = next(run for run in replayed.info.runs if run.label == "belady" and run.budget == "10%")
    held = replayed.resident(run.run, 0, replayed.info.trace.layers[-1])
    first = replayed.info.trace.sequences[0].prompt if replayed.info.prefill == "full" else 0
    assert held[:, first:].sum(-1).max() == run.budget_keys[0]


def test_the_summary_compares_every_run_with_the_bounds(replayed: Replay) -> None:
    rows = {(run.label, run.budget): run for run in replayed.summary.runs}
    for (label, budget), run in rows.items():
        if budget is None:
            assert run.bounds == BoundShares(None, None)
            continue
        most = rows["belady", budget].mean("retained_mass")
        ideal = rows["ideal", budget].mean("retained_mass")
        assert run.bounds.share_of_belady == pytest.approx(run.metrics["retained_mass"].mean / most)
        assert run.bounds.belady_of_ideal == pytest.approx(most / ideal)
        assert (run.bounds.share_of_belady <= 1 + 1e-6) or label == "ideal"


def test_without_bounds_the_summary_compares_nothing(replayed: Replay) -> None:
    runs = [run for run in replayed.summary.runs if run.policy != "belady"]
    assert shares(runs[-2], runs) == BoundShares(None, None)
    another = {"full": "stream", "stream": "full"}[replayed.info.prefill]
    other = [replace(run, prefill=another) if run.policy == "belady" else run for run in replayed.summary.runs]
    assert shares(runs[-2], other).share_of_belady is None, "another prefill is another bound"


@pytest.mark.parametrize("name", ["belady", "ideal"])
@pytest.mark.parametrize(
    "choice", [{"compress": "every:4"}, {"compress": "prefill"}, {"allocate": "uniform"}, {"accumulate": "float16"}]
)
def test_a_bound_with_other_choices_is_refused(name: str, choice: dict[str, str], trace: Trace) -> None:
    with pytest.raises(UsageError, match=f"--{next(iter(choice))} cannot be used with {name}: it is a bound"):
        EvictionPlan.make(parse_policy(name), **choice)
    options = ReplayOptions(plan=PlanOptions(**choice), skip_unsupported=True)
    job = compile_replay(trace, [name, "h2o"], options=options)
    assert list(job.skipped) == [name] and [plan.policy.name for plan in job.plans] == ["h2o"]


def test_all_includes_the_bounds() -> None:
    assert {"belady", "ideal"} <= set(POLICIES.names())

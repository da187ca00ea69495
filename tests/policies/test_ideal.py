"""The ideal set as a policy: what the metrics call ideal, and nobody's to exceed."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.engine.scoring import BlockScorer, MetricSeries
from kvscope.metrics import METRICS
from kvscope.policies.spec import parse_policy
from tests.engine.maps import KINDS, attention, run
from tests.policies.decisions import HEADS, LENGTH, PROMPTS_BUDGETS, golden, golden_rows, groups, head_sets
from tests.reference.policies.ideal import ideal

PREFILLS = ["full", "stream"]
IDEAL = parse_policy("ideal")


def metrics(simulation, rows: torch.Tensor, first: int, names: tuple[str, ...]) -> list[torch.Tensor]:
    """Return values of metrics, ``[L, H, S]`` each."""
    series = MetricSeries(simulation, [METRICS.get(name) for name in names], first)
    BlockScorer([series]).add(rows, 0)
    return [series.values()[name][0] for name in names]


@pytest.mark.parametrize("prefill", PREFILLS)
def test_what_it_reads_equals_the_plain_loop(prefill: str) -> None:
    for seed, ((heads, kv_heads), (prompt, budget)) in enumerate(itertools.product(HEADS, PROMPTS_BUDGETS)):
        rows, cut = groups(seed, heads, kv_heads, 2, LENGTH)
        simulation = run(IDEAL, rows, [budget], kv_heads=kv_heads, prompt=prompt, prefill=prefill)
        for layer, head in itertools.product(range(2), range(kv_heads)):
            assert head_sets(simulation, layer, head)[0] == ideal(cut[layer][head], budget, prompt, prefill)


@given(seed=st.integers(0, 10_000), kind=KINDS, length=st.integers(2, 24), budget=st.integers(1, 9), data=st.data())
@settings(max_examples=60, deadline=None)
def test_it_is_the_ideal_of_the_metrics(seed, kind, length, budget, data) -> None:
    """Head by head, ties too: what it reads is the ideal mask, so its mass is the ideal mass and its cosine one."""
    prompt, prefill = data.draw(st.integers(1, length - 1)), data.draw(st.sampled_from(PREFILLS))
    rows = attention(seed, 2, 3, length, kind)
    simulation = run(IDEAL, rows, [budget], kv_heads=3, prompt=prompt, prefill=prefill)
    first = prompt if prefill == "full" else 0
    mass, most, overlap = metrics(simulation, rows, first, ("retained_mass", "ideal_mass", "mask_cosine"))
    scored = ~mass.isnan()
    assert torch.equal(mass[scored], most[scored])
    assert overlap[scored].tolist() == pytest.approx([1.0] * int(scored.sum()), abs=1e-6)


def test_golden_figures() -> None:
    expected = golden("ideal", "")
    rows = golden_rows()
    heads, length = rows.shape[1], rows.shape[-1]
    simulation = run(IDEAL, rows, [expected["params"]["budget"]], kv_heads=heads, prompt=1, prefill="stream")
    mass, cosine = metrics(simulation, rows, 0, ("retained_mass", "full_cosine"))
    assert mass[0, :, 7:length].mean().item() == pytest.approx(expected["retained_mass"], abs=1e-6)
    assert cosine[0, :, 7:length].mean().item() == pytest.approx(expected["full_cosine"], abs=1e-6)


def test_it_retains_at_least_what_the_best_schedule_does_at_every_step() -> None:
    rows = attention(4, 2, 4, 40)
    mean = rows.view(2, 2, 2, 40, 40).mean(2)
    for prefill in PREFILLS:
        at = {"kv_heads": 2, "prompt": 15, "prefill": prefill}
        best, free = (
            (mean * run(parse_policy(name), rows, [7], **at).visible(0, 40)[0]).sum(-1) for name in ("belady", "ideal")
        )
        assert (free >= best - 1e-12).all()
        assert (free > best + 1e-6).any()


def test_a_key_that_a_window_forgot_is_not_read() -> None:
    rows = torch.full((1, 1, 12, 12), 1 / 12, dtype=torch.float64).tril()
    simulation = run(IDEAL, rows, [6], kv_heads=1, prompt=1, prefill="stream", windows=(4,))
    assert simulation.visible(0, 12).sum(-1)[0, 0, 0].tolist() == [1, 2, 3] + [4] * 9

"""Decisions of the authors' code as golden vectors: a replay must make the same ones."""

import json
from pathlib import Path

import pytest
import torch

from kvscope.engine.rows import Shape
from kvscope.engine.scoring import BlockScorer, MetricSeries
from kvscope.engine.simulation import CacheSimulation
from kvscope.metrics import METRICS
from kvscope.metrics.base import Rows
from kvscope.policies.spec import parse_policies

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden.json").read_text())


def case(policy: str, variant: str, **params: float) -> dict:
    return next(
        c
        for c in GOLDEN["cases"]
        if c["policy"] == policy and variant in c.get("variant", "") and params.items() <= c["params"].items()
    )


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """Full rows ``[1, H, T, T]`` of the fixed input, in float64."""
    heads, length = GOLDEN["heads"], GOLDEN["tokens"]
    h, q, k = torch.meshgrid(torch.arange(heads), torch.arange(length), torch.arange(length), indexing="ij")
    z = (37 * q + 61 * k + 17 * q * k + 101 * h * (k + 1) + 29 * (k**2 % 7)) % 997 / 250
    z = torch.where(k <= q, z.double(), -torch.inf)
    return torch.softmax(z, -1)[None]


def simulated(
    rows: torch.Tensor, spec: str, budget: int, prefill: str, first: int = 0
) -> tuple[CacheSimulation, MetricSeries]:
    length, heads = rows.shape[-1], rows.shape[1]
    shape = Shape(layers=(0,), heads=heads, kv_heads=heads, prompt=GOLDEN["prompt"], length=length)
    made = CacheSimulation(parse_policies([spec])[0], [budget], shape, prefill, dtype=torch.float64)
    series = MetricSeries(made, [metric for _, metric in METRICS.items()], first)
    for t in range(length):
        made.step(t, rows[:, :, t, : t + 1])
    BlockScorer([series], torch.ones(1, heads, length, 1, dtype=rows.dtype)).add(rows, 0)
    made.check()
    return made, series


def sets(mask: torch.Tensor) -> list[list[int]]:
    """Return the key lists of the heads of one step, from ``[G, n]``."""
    return [head.nonzero().flatten().tolist() for head in mask]


def test_the_input_is_the_published_one(rows: torch.Tensor) -> None:
    assert rows[0, 0, 3, :4].tolist() == pytest.approx(GOLDEN["check_row_3_head_0"], abs=1e-6)


def test_h2o_real_drop(rows: torch.Tensor) -> None:
    expected = case("h2o", "real drop")
    made, _ = simulated(rows, "h2o:recent=3", 6, "full")
    held = made.held(0, 20)[0, 0]
    assert sets(held[:, 11]) == expected["cache_after_prefill"]
    assert sets(held[:, 19]) == expected["cache_final"]


def test_a2sf_real_drop(rows: torch.Tensor) -> None:
    expected = case("a2sf", "real drop")
    made, _ = simulated(rows, "a2sf:alpha=0.2", 6, "full")
    held = made.held(0, 20)[0, 0]
    assert sets(held[:, 11]) == expected["cache_after_prefill"]
    assert sets(held[:, 19]) == expected["cache_final"]


@pytest.mark.parametrize(
    ("spec", "params"),
    [
        ("a2sf:alpha=0.2", {"alpha": 0.2, "select": 6}),
        ("a2sf:alpha=0", {"alpha": 0.0, "select": 6}),
        ("a2sf:alpha=1,recent=3", {"alpha": 1.0, "select": 3}),
    ],
)
def test_a2sf_streaming_mask_and_its_cosines(rows: torch.Tensor, spec: str, params: dict) -> None:
    expected = case("a2sf", "streaming", **params)
    made, series = simulated(rows, spec, 6, "stream")
    visible = made.visible(0, 20)[0, 0]
    for step, keys in expected["visible"].items():
        assert sets(visible[:, int(step)]) == keys
    values = {name: value[0, 0] for name, value in series.values().items()}
    for name, key in [
        ("ideal_cosine", "ideal_cosine"),
        ("ideal_cosine_flattened", "ideal_cosine_flattened"),
        ("full_cosine", "full_cosine"),
    ]:
        # The published figures count rows t > 6; row 6 is the first at which 7 keys are visible and none is missing.
        assert values[name][:, 7:].mean().item() == pytest.approx(expected[key], abs=1e-6)
        assert torch.isnan(values[name][:, :7]).all()


def test_h2o_without_recent_keys_is_a2sf_with_alpha_one(rows: torch.Tensor) -> None:
    one, _ = simulated(rows, "h2o:recent=0", 6, "stream")
    other, _ = simulated(rows, "a2sf:alpha=1", 6, "stream")
    assert torch.equal(one.state.leave, other.state.leave)


def test_tova_released_code(rows: torch.Tensor) -> None:
    expected = case("tova", "released")
    made, _ = simulated(rows, "tova", 6, "full")
    held = made.held(0, 20)[0, 0]
    assert sets(held[:, 11]) == [expected["cache_after_prefill_shared"]] * 2
    assert sets(held[:, 19]) == [expected["cache_final_shared"]] * 2


def test_the_ideal_row(rows: torch.Tensor) -> None:
    expected = next(c for c in GOLDEN["cases"] if c["policy"] == "ideal")
    steps = torch.arange(20)
    everything = (torch.arange(20) <= steps[:, None]).expand(1, 1, 2, 20, 20)
    block = Rows(rows, everything, everything, torch.tensor([6]), steps)
    mass = METRICS.get("ideal_mass").compute(block)[0, 0, :, 7:]
    assert mass.mean().item() == pytest.approx(expected["retained_mass"], abs=1e-6)
    cosine = METRICS.get("ideal_cosine").compute(block)[0, 0, :, 7:]  # everything visible: live row = full row
    assert cosine.mean().item() == pytest.approx(expected["full_cosine"], abs=1e-6)

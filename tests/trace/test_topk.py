"""Store topk: stored weights are exact, rebuilt ones are bounded, and the loss is reported."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvscope.core.errors import TraceError
from kvscope.metrics import METRICS
from kvscope.metrics.base import Rows
from kvscope.metrics.mass import SINKS
from kvscope.metrics.past import Past
from kvscope.trace import stretches as stretches_module
from kvscope.trace.reader import Trace, open_trace
from kvscope.trace.record_file import parse_record
from kvscope.trace.schema import HEADER
from kvscope.trace.storage_error import BOUNDS, approximate
from tests.trace.make import header, rows_of
from tests.trace.topk import rebuilt, record

ROUNDING = 2**-10  # of a sum of weights in 16 bit


@pytest.fixture(autouse=True)
def _short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stretches_module, "STRETCH", 8)


def made(path: Path, rows: np.ndarray, top: int, prompt: int, **options: int | None) -> Trace:
    record(path / "t", rows, top, prompt, **options)
    return open_trace(path / "t", verify=True)


def windowed(rows: np.ndarray, window: int | None) -> np.ndarray:
    """Return rows that see the newest keys alone."""
    if window is None:
        return rows
    length = rows.shape[1]
    rows = rows * ~np.tri(length, length, -window, dtype=bool)
    return rows / rows.sum(-1, keepdims=True)


@given(
    length=st.integers(1, 17),
    share=st.floats(0.01, 1),
    top=st.integers(1, 12),
    heads=st.integers(1, 2),
    block=st.integers(1, 9),
    window=st.sampled_from([None, None, 3, 8]),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_rows_are_rebuilt_as_a_plain_loop_does(
    tmp_path_factory, length, share, top, heads, block, window, seed
) -> None:
    rows = windowed(rows_of(seed, heads, length), window)
    prompt = max(1, int(share * length))
    trace = made(tmp_path_factory.mktemp("t"), rows, top, prompt, window=window, block=block)
    got = trace.attention(0, 0)
    assert np.allclose(got, rebuilt(rows, top, prompt, window), rtol=1e-4, atol=1e-7)
    start, stop = length // 3, max(length // 3 + 1, length - 1)
    assert np.allclose(trace.attention(0, 0, start, stop), got[:, start:stop, :stop], rtol=1e-6, atol=0)
    assert np.allclose(trace.row_sums(0, 0), rows.sum(-1), atol=1e-6)
    assert (got.sum(-1) <= trace.row_sums(0, 0) + ROUNDING).all()


@given(length=st.integers(2, 24), top=st.integers(1, 9), seed=st.integers(0, 99), share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_retained_mass_lies_between_what_is_kept_and_that_plus_the_residual(
    tmp_path_factory, length, top, seed, share
) -> None:
    rows = rows_of(seed, 2, length)
    trace = made(tmp_path_factory.mktemp("t"), rows, top, max(1, length // 2))
    seen = np.random.default_rng(seed).random(rows.shape) < share
    got, residual = trace.attention(0, 0), trace.residuals(0, 0)
    stored = np.zeros_like(rows)
    for head, query in np.ndindex(rows.shape[:2]):
        own = np.argsort(-rows[head, query, : query + 1], kind="stable")[:top]
        stored[head, query, own] = rows[head, query, own]
    low = (stored * seen).sum(-1)
    for full in (rows, got):
        retained = (full * seen).sum(-1) / full.sum(-1)
        assert (retained >= low - ROUNDING).all()
        assert (retained <= low + residual + ROUNDING).all()


@pytest.mark.parametrize("top", [20, 500])
def test_with_room_for_every_key_it_is_a_trace_of_rows(tmp_path: Path, top: int) -> None:
    rows = rows_of(3, 2, 20)
    trace = made(tmp_path, rows, top, 9)
    assert np.array_equal(trace.attention(0, 0), rows.astype(np.float16).astype(np.float32))
    assert trace.storage_error is None
    assert trace.approximate == []


def test_sums_of_columns_come_back_nearly(tmp_path: Path) -> None:
    """What policies that sum decide by: far nearer than with the residual spread evenly, or left out."""
    rows = rows_of(5, 2, 40)
    rows[:, :, ::3] *= 0.05  # some keys are light in every row
    rows /= rows.sum(-1, keepdims=True)
    trace = made(tmp_path, rows, 4, 24)
    got, residual = trace.attention(0, 0), trace.residuals(0, 0)
    stored = np.where(got >= np.sort(got, -1)[:, :, -4:-3], got, 0)
    even = stored + (stored == 0) * np.tri(40) * (residual / np.maximum(np.arange(40) - 3, 1))[..., None]
    exact = rows.sum(1)
    off, off_even, off_stored = (np.abs(kind.sum(1) - exact).sum() for kind in (got, even, stored))
    assert off < 0.5 * off_even < 0.5 * off_stored


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    rows = rows_of(3, 2, 20)
    trace = made(tmp_path, rows, 4, 9)
    residual = trace.residuals(0, 0)
    assert trace.storage_error.mean == pytest.approx(residual.mean(), rel=1e-5)
    assert trace.storage_error.mean_after_prompt == pytest.approx(residual[:, 9:].mean(), rel=1e-5)
    assert trace.storage_error.worst == pytest.approx(residual.max(), rel=1e-5)
    (said,) = trace.approximate
    assert said.startswith("Lossy: ")
    assert f"{trace.storage_error.mean_after_prompt:.1%}" in said
    assert trace.header.store == "topk"
    with pytest.raises(TraceError, match="does not hold vectors:keys"):
        trace.vectors(0, 0, "keys")
    with pytest.raises(TraceError, match="does not hold similarity"):
        trace.similarity(0, 0)


def test_all_prompt_says_the_mean_of_all_rows(tmp_path: Path) -> None:
    trace = made(tmp_path, rows_of(3, 1, 12), 4, 12)
    assert trace.storage_error.mean_after_prompt is None
    assert f"{trace.storage_error.mean:.1%}" in trace.approximate[0]


def test_no_sum_of_a_stretch_may_be_missing(tmp_path: Path) -> None:
    trace = made(tmp_path, rows_of(3, 1, 20), 4, 9)
    moved = replace(trace.sequences[0], prompt=10)
    trace.sequences[0] = moved
    with pytest.raises(TraceError, match="lacks the sums of columns up to position 9"):
        trace.attention(0, 0)


def test_some_heads_and_some_rows_are_said() -> None:
    part = replace(header(), head_numbers=[4, 5], n_heads=8, query_stride=3)
    assert [line.partition(":")[0] for line in approximate(part, None)] == ["Sampled", "Sampled"]
    assert "8 query heads 4, 5" in approximate(part, None)[0]
    assert approximate(header(), None) == []


def test_traces_from_before_have_all_rows_and_heads(tmp_path: Path) -> None:
    made(tmp_path, rows_of(3, 1, 12), 4, 6)
    data = json.loads((tmp_path / "t" / HEADER).read_text())
    for name in ("top", "head_numbers", "n_heads", "query_stride"):
        del data[name]
    old = parse_record(data, tmp_path).header
    assert (old.top, old.head_numbers, old.query_stride) == (None, [], 1)


def test_every_metric_has_a_stated_bound() -> None:
    assert set(BOUNDS) == {
        name for name in METRICS.names() if METRICS.get(name).compute.__module__.startswith("kvscope.")
    }


@given(seed=st.integers(0, 10**6), top=st.integers(2, 12), budget=st.integers(1, 14), length=st.integers(6, 24))
@settings(max_examples=60, deadline=None)
def test_metrics_are_within_their_bounds(tmp_path_factory, seed, top, budget, length) -> None:
    """For the same decisions: what is made of rebuilt rows is as near to what is made of the true ones as stated."""
    prompt = length // 2
    rows = rows_of(seed, 2, length)
    trace = made(tmp_path_factory.mktemp("t"), rows, top, prompt)
    draw = np.random.default_rng(seed)
    seen = draw.random((2, length, length)) < draw.random()
    seen |= np.eye(length, dtype=bool)
    seen &= np.tri(length, dtype=bool)
    true, got = (values(full, seen, budget, prompt) for full in (rows, trace.attention(0, 0)))
    limit = bounds(rows, trace.residuals(0, 0), seen, top, budget, prompt)
    assert set(limit) == {name for name, bound in BOUNDS.items() if bound != "none" and "not computed" not in bound}
    for name, bound in limit.items():
        off = np.abs(got[name] ** 2 - true[name] ** 2) if name == "full_cosine" else np.abs(got[name] - true[name])
        both = np.isfinite(off)
        assert (np.isnan(got[name]) == np.isnan(true[name])).all(), name
        assert (off[both] <= np.broadcast_to(bound, off.shape)[both] + 4 * ROUNDING).all(), name


def values(full: np.ndarray, seen: np.ndarray, budget: int, prompt: int) -> dict[str, np.ndarray]:
    """Return every metric that needs no values of each row, ``[H, T]``."""
    rows, visible = torch.tensor(full)[None], torch.tensor(seen)[None, None]
    signals = Past(["last_attended", "prompt_rank"], prompt).add(rows, 0)
    block = Rows(
        full=rows,
        visible=visible,
        held=visible,
        budget=torch.tensor([budget]),
        steps=torch.arange(rows.shape[2]),
        signals=signals,
    )
    chosen = [METRICS.get(name) for name in BOUNDS]
    return {
        metric.name: metric.compute(block).expand(1, 1, *full.shape[:2])[0, 0].double().numpy()
        for metric in chosen
        if not metric.pooled and "values" not in metric.needs
    }


def bounds(
    rows: np.ndarray, residual: np.ndarray, seen: np.ndarray, top: int, budget: int, prompt: int
) -> dict[str, np.ndarray | float]:
    """Return the bounds of `BOUNDS` for each row, ``[H, T]``; infinite where there is none."""
    heads, length, _ = rows.shape
    r, m, least = residual, np.zeros((heads, length)), np.zeros((heads, length))
    sums = np.zeros((4, heads, length))  # s, v, i, q
    for head, t in np.ndindex(heads, length):
        row = rows[head, t, : t + 1]
        stored = np.argsort(-row, kind="stable")[:top]
        m[head, t] = row[stored][stored >= SINKS].sum()
        least[head, t] = row[stored].min()
        others = np.argsort(-row[:t], kind="stable")[:budget]
        ideal = np.isin(np.arange(t + 1), [*others, t])
        square = np.zeros(t + 1)
        square[stored] = row[stored] ** 2
        own = seen[head, t, : t + 1]
        sums[:, head, t] = square.sum(), square[own].sum(), square[ideal].sum(), square[own & ideal].sum()
    s, v, i, q = sums
    e = r * least
    few = np.inf if budget >= top else 0.0
    rest = np.divide(r, m + r, out=np.ones_like(r), where=m + r > 0)
    # both cosines lie between these two, so they are no further apart than they are
    low = q / np.sqrt((v + e) * (i + e))
    high = np.divide(q + e, np.sqrt(v * i), out=np.full_like(q, np.inf), where=v * i > 0)
    return {
        "retained_mass": r,
        "retained_mass_no_sinks": rest,
        "ideal_mass": r,
        "ideal_mass_no_sinks": rest,
        "full_cosine": e / (s + e),
        "ideal_cosine": high - low + few,
        "mask_cosine": few,
        "ideal_recall": few,
        "recovered_mass": r + few,
        "recovered_mass_no_sinks": rest + few,
        "read_keys": 0.0,
        "held_keys": 0.0,
    }

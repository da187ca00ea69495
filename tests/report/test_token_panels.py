"""What the panels below the bar say, as plain data, against plain loops over the same replay and trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import kvscope
from kvscope.core.residency import ResidencyIntervals
from kvscope.core.summary_records import LoopGap
from kvscope.report.attended import attended
from kvscope.report.encoding import packed_bytes, unpacked
from kvscope.report.limits import Limits
from kvscope.report.page import page_data
from kvscope.report.panels.agreement import STEPS, agreement
from kvscope.report.panels.head_map import head_map
from kvscope.report.panels.inspector import inspector
from kvscope.report.panels.norms import norms
from kvscope.report.panels.over_time import bins, over_time
from kvscope.report.panels.queries import queries
from kvscope.report.panels.regrets import regrets
from kvscope.report.panels.residency_raster import residency_raster
from kvscope.report.panels.text_view import text_view
from kvscope.report.parts import NamedSpan, spread
from kvscope.report.regret import worst_evictions
from kvscope.report.residency import packed_intervals
from kvscope.report.source import ReportInput
from kvscope.trace.prompt_parts import ImageRecord
from kvscope.trace.reader import Trace
from tests.report.make import HEADS, KV_HEADS, LENGTH, make_replay, make_trace
from tests.report.test_summary_panels import run_of
from tests.results.make import with_summary


def limited(source: ReportInput, **limits: int) -> ReportInput:
    return replace(source, limits=Limits(**limits))


def notes(source: ReportInput, panel: str) -> list[str]:
    return next(list(each["notes"]) for each in page_data(source)["panels"] if each["name"] == panel)


def resident(raster: dict[str, Any], length: int = LENGTH) -> np.ndarray:
    """Return ``[G, T, T]`` as `Replay.resident` does, from what the page carries."""
    leave = unpacked(raster["leave"])
    counts = raster["counts"] or [length] * raster["stored"]
    key = unpacked(raster["key"]) if "key" in raster else np.tile(np.arange(length), raster["stored"])
    enter = unpacked(raster["enter"]) if "enter" in raster else key
    mask = np.zeros((raster["stored"], length, length), bool)
    head = np.repeat(np.arange(raster["stored"]), counts)
    for at in range(len(leave)):
        mask[head[at], enter[at] : leave[at], key[at]] = True
    return np.broadcast_to(mask, (raster["heads"], length, length)) if raster["stored"] == 1 else mask


def coming_back() -> tuple[pd.DataFrame, np.ndarray]:
    """Return rows of two heads over three steps, in which keys come back, and the mask ``[G, T, T]`` they stand for."""
    frame = pd.DataFrame(
        {
            "kv_head": [1, 0, 0, 0, 1, 1, 1],
            "key": [2, 0, 1, 2, 0, 0, 1],
            "enter": [2, 0, 1, 2, 0, 2, 1],
            "leave": pd.array([None, None, 1, None, 1, None, 2], dtype="Int32"),
        }
    )
    mask = [[[1, 0, 0], [1, 0, 0], [1, 0, 1]], [[1, 0, 0], [0, 1, 0], [1, 0, 1]]]
    return frame, np.array(mask, bool)


def test_images_are_named_and_numbered(tmp_path: Path) -> None:
    image = ImageRecord("/some/where/cat.png", "d" * 64, 40, 24, 1, 3, 2)
    trace = make_trace(tmp_path / "trace", images=[image])
    replay = make_replay(tmp_path / "replay", trace)
    (part,) = page_data(ReportInput((replay,), {trace.identity: trace}))["parts"].values()
    assert part["tokens"][:3] == ["The", "image 1 (1/2)", "image 1 (2/2)"]
    assert part["images"] == [{"number": 1, "file": "cat.png", "width": 40, "height": 24, "start": 1, "stop": 3}]


def test_raster_carries_what_the_replay_holds(source: ReportInput) -> None:
    data = residency_raster(source)
    assert len(data["rasters"]) == 2 * len(source.runs)
    for raster in data["rasters"]:
        expected = source.replays[0].resident(int(raster["run"].split(".")[1]), 0, raster["layer"])
        np.testing.assert_array_equal(resident(raster), expected)
    assert data["notes"] == []


def test_parts_carry_texts_with_nothing_hidden(source: ReportInput) -> None:
    assert page_data(source)["parts"] == {
        "0.0": {
            "number": 0,
            "prompt": 3,
            "length": 6,
            "tokens": ["The", "␣king", "↵", "␣said", "␣4", "821"],
            "images": [],
            "layers": [0, 1],
            "layer": 0,
            "heads": 4,
            "group": 2,
        }
    }


def intervals_of(frame: pd.DataFrame, heads: int, length: int) -> ResidencyIntervals:
    columns = {name: frame[name].to_numpy() for name in ("kv_head", "key", "enter")}
    leave = frame["leave"].fillna(-1).to_numpy(np.int32)
    return ResidencyIntervals.of(**columns, leave=leave, heads=heads, length=length)


def test_heads_that_agree_are_carried_once_and_only_leaving_steps_are_needed(source: ReportInput) -> None:
    raster = residency_raster(source)["rasters"][0]
    assert (raster["stored"], raster["heads"], raster["counts"]) == (1, 2, None)
    assert set(raster) == {"run", "part", "layer", "heads", "stored", "counts", "leave"}


def test_keys_that_come_back_keep_every_interval() -> None:
    frame, expected = coming_back()
    intervals = intervals_of(frame, 2, 3)
    raster = packed_intervals(intervals)
    np.testing.assert_array_equal(resident(raster, 3), expected)
    assert raster["counts"] == [3, 4]
    for step in range(3):
        np.testing.assert_array_equal(intervals.held_after(step), expected[:, step].reshape(-1))
    np.testing.assert_array_equal(intervals.holding_heads(np.arange(3)), expected.sum(0))


def test_absences_are_what_lies_between_intervals_and_after_the_last() -> None:
    found = intervals_of(coming_back()[0], 2, 3).absences()
    head, key, start, until = (each.tolist() for each in (found.head, found.key, found.start, found.until))
    # head 0 drops key 1 at birth, head 1 misses key 0 at step 1 only and key 1 from step 2 on
    assert list(zip(head, key, start, until, strict=True)) == [(0, 1, 1, 3), (1, 0, 1, 2), (1, 1, 2, 3)]


def test_long_sequences_need_more_than_16_bit() -> None:
    length = 70_000
    keys = np.arange(length)
    frame = pd.DataFrame({"kv_head": 0, "key": keys, "enter": keys, "leave": np.where(keys < 9, length - 1, -1)})
    raster = packed_intervals(intervals_of(frame, 1, length))
    assert raster["leave"]["dtype"] == "int32"
    assert unpacked(raster["leave"]).tolist() == [length - 1] * 9 + [length] * (length - 9)


LIMITED = "all rasters together are limited to {} bytes. residency.parquet has all of them."


def test_raster_limit_is_said_and_keeps_runs_comparable(source: ReportInput) -> None:
    one = sum(packed_bytes(raster["leave"]) for raster in residency_raster(source)["rasters"] if raster["layer"] == 0)
    data = residency_raster(limited(source, raster_bytes=one))
    assert {raster["layer"] for raster in data["rasters"]} == {0}
    assert {raster["run"] for raster in data["rasters"]} == {run.id for run in source.runs}
    assert data["notes"] == [f"1 of 2 layers are shown: {LIMITED.format(one)}"]


def test_a_layer_that_does_not_fit_has_the_best_runs(source: ReportInput) -> None:
    data = residency_raster(limited(source, raster_bytes=100))
    shown = [raster["run"] for raster in data["rasters"]]
    assert 0 < len(shown) < len(source.runs)
    assert shown == [run.id for run in source.detailed[: len(shown)]]
    assert {run_of(source, "tova", budget).id for budget in ("2", "4")} <= {run.id for run in source.detailed[:3]}
    assert data["notes"] == [f"{len(shown)} of 7 runs are shown, in 1 of 2 layers: {LIMITED.format(100)}"]
    assert residency_raster(limited(source, raster_bytes=1))["rasters"] == []


def test_layers_that_fit_are_spread_over_the_depth() -> None:
    assert spread(range(9)) == [4, 0, 8, 2, 6, 1, 3, 5, 7]
    assert spread([5]) == [5]
    assert sorted(spread(range(32))) == list(range(32))


def test_sequences_that_do_not_fit_are_said(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "trace", sequences=3)
    replay = make_replay(tmp_path / "replay", trace, mass={"h2o": {"2": 0.5}})
    source = ReportInput((replay,), {trace.identity: trace}, Limits(sequences=2))
    assert list(source.parts) == ["0.0", "0.1"]
    page = page_data(source)
    assert page["notes"] == ["Below, 2 of 3 sequences are shown; the numbers above are of all sequences."]
    assert list(page_data(replace(source, limits=Limits(text_bytes=1)))["parts"]) == ["0.0"]


def test_map_is_the_mean_per_layer_and_head(source: ReportInput) -> None:
    data = head_map(source)
    made = data["maps"]["0.3"]
    assert made["layers"] == [0, 1]
    expected = [[0.6, 0.61, 0.62, 0.63], [0.62, 0.63, 0.64, 0.65]]
    np.testing.assert_allclose(unpacked(made["values"]["retained_mass"]), expected, atol=1e-6)
    assert "retained_mass" not in data["maps"]["0.0"]["values"], "nothing was evicted"
    assert data["scale"]["retained_mass"] == pytest.approx([0.225, 0.9])


def test_map_limit_is_said(source: ReportInput) -> None:
    data = head_map(limited(source, map_bytes=200))
    assert 0 < len(data["maps"]) < 7
    missing = 7 - len(data["maps"])
    assert data["notes"] == [
        f"Maps of {missing} of 7 runs are omitted to limit the size of the page; fidelity.parquet has them."
    ]


def test_lines_over_time_are_means_over_layers_and_heads(source: ReportInput) -> None:
    data = over_time(source)
    assert data is not None
    part = data["parts"]["0.0"]
    assert part["edges"] == [3, 4, 5, 6]
    np.testing.assert_allclose(unpacked(part["runs"]["0.3"]["retained_mass"]), [0.625] * 3, atol=1e-6)
    assert unpacked(part["runs"]["0.3"]["held_keys"]).tolist() == [2, 2, 2]
    assert over_time(limited(source, line_bytes=100))["notes"][0].startswith("Lines of")  # type: ignore[index]


def test_outcomes_over_time_stand_where_the_token_is_predicted(rich: ReportInput) -> None:
    data = over_time(rich)
    assert data is not None
    part = data["parts"]["0.0"]
    lines = part["runs"][run_of(rich, "tova", "4", "closed").id]
    assert part["edges"][0] == 9, "the last step of the prompt predicts the first token after it"
    ratio = unpacked(lines["perplexity_ratio"])
    np.testing.assert_allclose(ratio[:-1], np.exp(0.375), atol=1e-6)
    assert np.isnan(ratio[-1]), "nothing follows the last token"
    assert "perplexity_ratio" not in part["runs"][run_of(rich, "tova", "4").id]


def test_bins_are_even_and_whole() -> None:
    assert bins(3, 6, 10).tolist() == [3, 4, 5, 6]
    assert bins(0, 10, 4).tolist() == [0, 2, 5, 7, 10]


def test_text_shade_is_the_share_of_heads_that_hold_the_token(source: ReportInput) -> None:
    data = text_view(source)
    assert data is not None
    part = data["parts"]["0.0"]
    assert (part["steps"], part["heads"]) == ([2, 3, 4, 5], 4)
    masks = [source.replays[0].resident(3, 0, layer) for layer in (0, 1)]
    expected = np.concatenate(masks).mean(0)[part["steps"]]
    np.testing.assert_allclose(unpacked(part["runs"]["0.3"]) / 255, expected, atol=1 / 255)
    assert part["surprise"] is None
    assert part["loss"] == {}


def test_text_knows_loss_and_surprise_where_they_are(rich: ReportInput) -> None:
    data = text_view(rich)
    assert data is not None
    part = data["parts"]["0.0"]
    np.testing.assert_allclose(unpacked(part["surprise"]), 0.25 * np.arange(24), atol=1e-3)
    closed = run_of(rich, "tova", "4", "closed")
    loss = unpacked(part["loss"][closed.id])
    assert np.isnan(loss[:10]).all(), "the prompt is not scored"
    np.testing.assert_allclose(loss[10:], 0.375, atol=1e-6)
    assert run_of(rich, "tova", "4").id not in part["loss"]


def regret_by_loop(source: ReportInput, run: int, layer: int) -> dict[tuple[int, int], float]:
    """Return the attention that each key of each key/value head misses, step by step."""
    trace = next(iter(source.traces.values()))
    rows = trace.attention(0, layer).reshape(KV_HEADS, HEADS // KV_HEADS, *[trace.sequences[0].length] * 2).mean(1)
    visible = source.replays[0].visible(run, 0, layer)
    lost = {}
    for head in range(KV_HEADS):
        for key in range(rows.shape[-1]):
            value = sum(float(rows[head, t, key]) for t in range(key, rows.shape[1]) if not visible[head, t, key])
            if value:
                lost[head, key] = value
    return lost


def test_regret_is_the_attention_that_later_queries_could_not_give(rich: ReportInput) -> None:
    data = regrets(limited(rich, worst=200))
    assert data is not None
    run = run_of(rich, "h2o", "4")
    by_loop = {
        (layer, *where): value for layer in (0, 1) for where, value in regret_by_loop(rich, run.number, layer).items()
    }
    worst = data["parts"]["0.0"]["worst"][run.id]
    found = {(layer, head, key): mass for layer, head, key, _, mass, _, _ in worst}
    assert found == {where: pytest.approx(value, rel=1e-3) for where, value in by_loop.items()}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    tokens = np.zeros(24)
    for (_, _, key), value in by_loop.items():
        tokens[key] += value
    np.testing.assert_allclose(unpacked(data["parts"]["0.0"]["tokens"][run.id]), tokens, atol=1e-3)


def test_the_step_that_missed_a_key_most(rich: ReportInput) -> None:
    data = regrets(rich)
    assert data is not None
    rows = next(iter(rich.traces.values())).attention(0, 1).reshape(KV_HEADS, 2, 24, 24).mean(1)
    for layer, head, key, gone, _, missed, weight in data["parts"]["0.0"]["worst"][run_of(rich, "window", "4").id]:
        if layer == 1:
            later = rows[head, gone + 1 :, key]
            assert missed == gone + 1 + int(later.argmax())
            assert weight == pytest.approx(float(later.max()), rel=1e-3)


def test_regrets_are_bounded_and_say_which_layers_were_read(rich: ReportInput) -> None:
    few = regrets(limited(rich, worst=3))
    assert few is not None
    assert {len(rows) for rows in few["parts"]["0.0"]["worst"].values()} == {0, 3}
    one_layer = regrets(limited(rich, weights=HEADS * 24 * 25 // 2))
    assert one_layer is not None
    assert {row[0] for rows in one_layer["parts"]["0.0"]["worst"].values() for row in rows} == {0}
    assert one_layer["notes"] == ["To limit the time, all rows were read in only 1 of 2 layers (0)."]
    nothing = regrets(limited(rich, weights=0))
    assert nothing is not None
    assert nothing["notes"] == ["To limit the time, all rows were read in only 0 of 2 layers."]


def test_a_key_that_comes_back_is_missed_only_in_between(rich: ReportInput) -> None:
    trace = next(iter(rich.traces.values()))
    key = np.tile(np.arange(24), KV_HEADS)
    head = np.repeat(np.arange(KV_HEADS), 24)
    frame = pd.DataFrame({"kv_head": head, "key": key, "enter": key, "leave": np.where(key == 5, 8, -1)})
    again = pd.DataFrame({"kv_head": [0], "key": [5], "enter": [12], "leave": [-1]})
    layer = attended(trace, 0, 0, {"one": intervals_of(pd.concat([frame, again]), KV_HEADS, 24)})
    found = layer.losses["one"]
    rows = trace.attention(0, 0).reshape(KV_HEADS, 2, 24, 24).mean(1)
    assert list(zip(found.head.tolist(), found.key.tolist(), strict=True)) == [(0, 5), (1, 5)]
    np.testing.assert_allclose(found.mass, [rows[0, 9:13, 5].sum(), rows[1, 9:, 5].sum()], rtol=1e-5)
    between = 9 + int(rows[0, 9:13, 5].argmax())
    assert rows[0, 13:, 5].max() > rows[0, between, 5], "later, when it is back, it is looked at more"
    first = next(each for each in worst_evictions(trace, 0, {0: layer}, ["one"], 5)["one"] if each.head == 0)
    assert (first.gone, first.missed) == (8, between)
    assert first.weight == pytest.approx(float(rows[0, between, 5]))


def test_the_regret_of_the_page_is_that_of_the_command(rich: ReportInput) -> None:
    """Both read rows in their own way, the page for many runs at once and the command for lags too."""
    replay, (trace,) = rich.replays[0], rich.traces.values()
    run = run_of(rich, "h2o", "4")
    data = regrets(rich)
    assert data is not None
    assert data["parts"]["0.0"]["spans"] == [["needle", 2, 5]]
    given = regrets(replace(rich, spans={f"{trace.identity}/0": [NamedSpan("end", 20, 22)]}))
    assert given is not None and given["parts"]["0.0"]["spans"] == [["needle", 2, 5], ["end", 20, 22]]
    (of_command,) = kvscope.regrets(replay, trace, [run.number], top=20)["runs"]
    shown = data["parts"]["0.0"]["worst"][run.id][:20]
    assert len(shown) == len(of_command["worst"]) == 20
    for (layer, head, key, gone, mass, missed, weight), each in zip(shown, of_command["worst"], strict=True):
        assert (layer, head, key, gone) == (each["layer"], each["kv_head"], each["key"], each["gone"])
        assert (mass, missed, weight) == pytest.approx((each["mass"], each["wanted"][0], each["weights"][0]), rel=1e-3)


def test_inspector_carries_rows_as_the_trace_holds_them(rich: ReportInput) -> None:
    data = inspector(rich)
    assert data is not None
    trace = next(iter(rich.traces.values()))
    rows = data["parts"]["0.0"]["rows"]
    assert len({(row["layer"], row["head"], row["step"]) for row in rows}) == len(rows)
    for row in rows[:20]:
        expected = trace.attention(0, row["layer"], row["step"], row["step"] + 1)[row["head"], 0]
        np.testing.assert_array_equal(unpacked(row["weights"]), expected.astype(np.float16))
    assert data["notes"] == [f"The page contains {len(rows)} of {2 * 4 * 24} attention rows; the trace has all."]


def test_inspector_takes_the_rows_that_miss_a_key_first(rich: ReportInput) -> None:
    data = inspector(limited(rich, row_bytes=400))
    assert data is not None
    worst = rich.worst(rich.parts["0.0"])[run_of(rich, "h2o", "4").id][:5]
    missed = {(each.layer, 2 * each.head + query, each.missed) for each in worst for query in (0, 1)}
    carried = {(row["layer"], row["head"], row["step"]) for row in data["parts"]["0.0"]["rows"]}
    assert 0 < len(carried) < 10
    assert carried <= missed, "every run of the fixture holds the same keys, and so has the same regrets"
    none = inspector(limited(rich, row_bytes=1))
    assert none is not None
    assert none["notes"][0].startswith("The page contains 0 of 192 attention rows")


def test_heavy_hitters_are_the_keys_that_received_most(rich: ReportInput) -> None:
    data = inspector(rich)
    assert data is not None
    received = next(iter(rich.traces.values())).attention(0, 1).sum(1).reshape(KV_HEADS, 2, 24).mean(1)
    heavy = data["parts"]["0.0"]["heavy"]["1"]
    assert heavy[1] == sorted(sorted(range(4, 24), key=lambda key: -received[1, key])[:20])


def test_agreement_is_keys_in_both_over_keys_in_either(rich_trace: Trace, tmp_path: Path) -> None:
    mass = {"h2o": {"4": 0.5}, "tova": {"4": 0.4}, "first-keys": {"4": 0.3}, "window": {"8": 0.6}}
    replay = make_replay(tmp_path / "replay", rich_trace, mass=mass)
    data = agreement(ReportInput((replay,)))
    assert data is not None
    (group,) = data["groups"]
    assert group["runs"] == ["0.0", "0.1", "0.2"], "the other budget has one run only"
    a, b = (np.stack([replay.resident(run, 0, layer) for layer in (0, 1)])[:, :, 10:] for run in (0, 2))
    expected = (a & b).sum() / (a | b).sum()
    assert 0.1 < expected < 0.9
    np.testing.assert_allclose(
        unpacked(group["values"]), [[1, 1, expected], [1, 1, expected], [expected, expected, 1]], atol=1e-4
    )
    assert f"at {STEPS} evenly spaced steps" in data["notes"][0]


def test_what_both_loops_hold_is_shown_by_layer(trace: Trace, tmp_path: Path) -> None:
    replay = make_replay(tmp_path / "r", trace, mass={"h2o": {"2": 0.5}, "tova": {"4": 0.4}}, loop="closed")
    replay = with_summary(replay, 1, gap=LoopGap(0.75, {"0": 1.0, "1": 0.5}, None))
    data = agreement(ReportInput((replay,)))
    assert data is not None and data["groups"] == []
    assert data["loops"] == [{"run": "0.1", "all": 0.75, "layers": [1.0, 0.5]}]


def test_norms_are_those_of_the_trace_beside_what_was_received(rich: ReportInput, source: ReportInput) -> None:
    assert norms(source) is None, "the small trace holds no norms"
    data = norms(rich)
    assert data is not None
    layer = data["parts"]["0.0"]["1"]
    trace = next(iter(rich.traces.values()))
    received = trace.attention(0, 1).sum(1).reshape(KV_HEADS, 2, 24).mean(1)
    np.testing.assert_allclose(unpacked(layer["received"]), received, rtol=2e-3)
    np.testing.assert_allclose(unpacked(layer["norm"]), trace.value_norms(0, 1), rtol=1e-3)


def test_query_similarity_is_the_cosine_at_each_lag(rich: ReportInput, source: ReportInput) -> None:
    assert queries(source) is None, "the small trace holds no queries"
    data = queries(rich)
    assert data is not None
    lines = unpacked(data["parts"]["0.0"]["layers"]["0"])
    np.testing.assert_allclose(lines[0], np.cos(1.0), atol=1e-4)  # the query turns by one radian a step
    np.testing.assert_allclose(lines[1][4:], np.cos(5.0), atol=1e-4)
    assert np.isnan(lines[1][:4]).all()
    assert np.isnan(lines[2]).all(), "the sequence is shorter than the lag"

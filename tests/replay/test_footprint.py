"""The number of layers that are replayed together, and the stated memory."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

import kvscope.replay.footprint as module
from kvscope.core.budget import parse_budgets
from kvscope.core.options import Prefill
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import runs_of
from kvscope.metrics import METRICS
from kvscope.policies.spec import parse_policies
from kvscope.replay.footprint import Footprint, footprint
from kvscope.replay.layer_group import LayerGroup
from kvscope.replay.open_loop import OpenLoop
from kvscope.replay.reading import BlockReader, GroupSpec
from kvscope.replay.run import replay
from kvscope.trace.reader import Trace, open_trace

POLICIES = ["h2o", "tova", "lru", "streaming-llm"]


@pytest.fixture(scope="module")
def example() -> Trace:
    return open_trace(Path(__file__).parents[2] / "traces" / "example")


def test_layers_one_by_one_give_the_same_as_all_together(
    example: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Footprint] = []
    together = replay(example, POLICIES, "20%,40%", output=tmp_path / "together", announce=said.append)
    monkeypatch.setattr(module, "GROUP_BYTES", 2**20)
    apart = replay(example, POLICIES, "20%,40%", output=tmp_path / "apart", announce=said.append)
    assert [needs.layers for needs in said] == [len(example.layers), 1]
    assert said[1].bytes < said[0].bytes
    for file in ("residency.parquet", "fidelity.parquet"):
        one, other = (pd.read_parquet(made.path / file) for made in (together, apart))
        order = [
            name for name in ("run", "sequence", "layer", "head", "kv_head", "step", "key", "enter") if name in one
        ]
        one, other = (frame.sort_values(order).reset_index(drop=True) for frame in (one, other))
        pd.testing.assert_frame_equal(one, other, check_exact=True)


@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_the_stated_memory_covers_the_arrays(example: Trace, prefill: str) -> None:
    runs = runs_of([EvictionPlan.published(policy) for policy in parse_policies(POLICIES)], parse_budgets("20%,40%"))
    metrics = [METRICS.get(name) for name in METRICS.names() if not METRICS.get(name).needs]
    sequence = example.sequences[0]
    work = OpenLoop(example, runs, metrics, Prefill(prefill), torch.device("cpu"))
    needs = work.footprints[sequence.index]
    assert needs.layers == len(example.layers)
    group = LayerGroup(work, sequence, example.layers)
    spec = GroupSpec(sequence, example.layers, needs.steps)
    with BlockReader(example, [spec], work.device) as reader:
        for block in group.blocks(reader.blocks(0)):
            for simulation in group.simulations:
                simulation.block(block)
            group.score(block)
    group.check()
    kept = 0
    for each in group.plan_runs:
        state, blocks = each.simulation.state, each.series._blocks.values()
        tensors = [state.leave, state.alive, state.score, *(part for parts in blocks for part in parts)]
        kept += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert needs.bytes / (20 if prefill == "stream" else 100) < kept < needs.bytes


def test_a_long_sequence_has_shorter_blocks(example: Trace) -> None:
    from dataclasses import replace

    sequence = replace(example.sequences[0], length=200_000)
    needs = footprint(
        example,
        sequence,
        [EvictionPlan.published(policy) for policy in parse_policies([f"a2sf:alpha=0.{n}" for n in range(4)])],
        10,
    )
    assert needs.layers == 1 and needs.steps < module.BLOCK_STEPS

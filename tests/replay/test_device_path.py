"""The path of a GPU, taken on a CPU: the same decisions and metrics, few copies, and nothing waits for the device."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kvscope.core.budget import parse_budgets
from kvscope.core.errors import TraceError
from kvscope.core.options import Prefill
from kvscope.engine import read_ahead
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.rows import Block
from kvscope.engine.runs import runs_of
from kvscope.engine.signals import measurable
from kvscope.kernels import device as devices
from kvscope.policies.spec import parse_policies
from kvscope.replay.layer_group import LayerGroup
from kvscope.replay.open_loop import OpenLoop
from kvscope.replay.reading import BlockReader, GroupSpec
from kvscope.replay.run import replay
from kvscope.results.store import Replay
from kvscope.trace.reader import Trace, open_trace
from tests.trace.layers import record as record_layers
from tests.trace.test_derive import record as record_vectors

POLICIES = ["h2o", "a2sf", "tova", "window", "belady", "random"]
ORDER = ["run", "sequence", "layer", "head", "kv_head", "step", "key", "enter"]


@pytest.fixture(scope="module")
def example() -> Trace:
    return open_trace(Path(__file__).parents[2] / "traces" / "example")


def tables(made: Replay) -> list[pd.DataFrame]:
    frames = [pd.read_parquet(made.path / file) for file in ("residency.parquet", "fidelity.parquet")]
    return [frame.sort_values([name for name in ORDER if name in frame]).reset_index(drop=True) for frame in frames]


def same(one: Replay, other: Replay) -> None:
    """Compare decisions exactly, and metrics up to the order of summation."""
    (stays, metrics), (other_stays, other_metrics) = tables(one), tables(other)
    pd.testing.assert_frame_equal(stays, other_stays, check_exact=True)
    pd.testing.assert_frame_equal(metrics, other_metrics, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("limit", [1, 2**28])
def test_a_trace_of_rows(example: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    one = replay(example, POLICIES, "20%,40%", output=tmp_path / "cpu")
    monkeypatch.setattr(devices, "on_cpu", lambda device: False)
    monkeypatch.setattr(read_ahead, "LIMIT_BYTES", limit)
    same(one, replay(example, POLICIES, "20%,40%", output=tmp_path / "device"))


@pytest.mark.parametrize("sinks", [False, True])
def test_a_trace_of_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sinks: bool) -> None:
    trace = record_vectors(tmp_path / "t", sinks=sinks)
    one = replay(trace, POLICIES, "3,6", output=tmp_path / "cpu")
    monkeypatch.setattr(devices, "on_cpu", lambda device: False)
    same(one, replay(trace, POLICIES, "3,6", output=tmp_path / "device"))


@pytest.mark.parametrize("store", ["maps+vectors", "qkv"])
def test_a_trace_whose_layers_differ_in_their_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str
) -> None:
    trace = record_layers(tmp_path / "t", store=store)
    one = replay(trace, [*POLICIES, "cake"], "8,13", output=tmp_path / "cpu")
    monkeypatch.setattr(devices, "on_cpu", lambda device: False)
    same(one, replay(trace, [*POLICIES, "cake"], "8,13", output=tmp_path / "device"))


def test_a_group_can_be_read_again(example: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "on_cpu", lambda device: False)
    sequence = example.sequences[0]
    groups = [GroupSpec(sequence, [layer], sequence.length // 3) for layer in example.layers[:3]]
    whole = [example.attention(0, layer) for layer in example.layers[:3]]
    with BlockReader(example, groups, torch.device("cpu")) as reader:
        next(reader.blocks(0))  # as if memory did not suffice for the rest
        for number in (0, 0, 1, 1, 2):
            for block in reader.blocks(number):
                rows = block.place().rows[0].numpy()
                assert np.array_equal(rows, whole[number][:, block.start : block.stop, : block.stop])


def test_fewer_runs_at_a_time_give_the_same(example: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory does not suffice for all runs, the rows of a group are read again."""
    monkeypatch.setattr(devices, "on_cpu", lambda device: False)
    one = replay(example, POLICIES, "20%,40%", output=tmp_path / "all")
    score = LayerGroup.score

    def short(self: LayerGroup, block: Block) -> None:
        if sum(len(each.runs) for each in self.plan_runs) > 4 and block.start:
            raise MemoryError
        score(self, block)

    monkeypatch.setattr(LayerGroup, "score", short)
    same(one, replay(example, POLICIES, "20%,40%", output=tmp_path / "parts"))


def test_errors_of_the_reader_reach_the_caller(example: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = example.stored_rows

    def broken(sequence: int, layer: int, start: int, stop: int) -> object:
        if start:
            raise TraceError("it is damaged", "Record it again.")
        return whole(sequence, layer, start, stop)

    monkeypatch.setattr(example, "stored_rows", broken)
    monkeypatch.setattr(devices, "on_cpu", lambda device: False)
    with pytest.raises(TraceError, match="it is damaged"):
        replay(example, ["h2o"], "20%", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvscope-read")]


class Waits(TorchFunctionMode):
    """Counts calls that wait for a device, or copy to one."""

    NAMES = frozenset(
        {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        if name in self.NAMES or (name == "where" and len(args) == 1):
            self.waits[name] += 1
        if name == "__getitem__" or name == "__setitem__":
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(place, torch.Tensor) and place.dtype == torch.bool for place in places):
                self.waits[name] += 1
        if name == "tensor" or (name == "to" and any(isinstance(arg, torch.device) for arg in args)):
            self.copies[name] += 1
        return func(*args, **kwargs)


class Operations(TorchDispatchMode):
    """Counts operations, most of which are a launch on a GPU, and those that wait for its result."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2"):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


def counted(trace: Trace, steps: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Waits, Operations, int]:
    """Return what loading and scoring all blocks of so many steps costs, and the number of blocks."""
    monkeypatch.setattr(devices, "on_cpu", lambda device: False)
    plans = [EvictionPlan.published(policy) for policy in parse_policies(["h2o", "tova:scope=kv_head", "window"])]
    runs, sequence = runs_of(plans, parse_budgets("20%,40%")), trace.sequences[0]
    metrics, _ = measurable(trace)
    work = OpenLoop(trace, runs, metrics, Prefill.stream, torch.device("cpu"))
    group, spec = LayerGroup(work, sequence, trace.layers), GroupSpec(sequence, trace.layers, steps)
    waits, operations = Waits(), Operations()
    with BlockReader(trace, [spec], work.device) as reader:
        blocks = group.blocks(reader.blocks(0))
        for _ in spec.ranges:
            with waits, operations:
                block = next(blocks)
            for simulation in group.simulations:  # steppers have tests of their own
                simulation.block(block)
            with waits, operations:
                group.score(block)
    return waits, operations, len(spec.ranges)


def test_the_counters_see_what_waits() -> None:
    numbers, waits, operations = torch.arange(3), Waits(), Operations()
    with waits, operations:
        numbers.cpu(), numbers.tolist(), numbers[0].item(), bool(numbers[0]), numbers.nonzero(), numbers[numbers > 1]
        numbers.to(torch.device("cpu"), non_blocking=True), torch.tensor([1], device="cpu")
    assert set(waits.waits) >= {"cpu", "tolist", "item", "__bool__", "nonzero", "__getitem__"}
    assert waits.copies == {"to": 1, "tensor": 1}
    assert operations.waits["nonzero"] >= 1
    assert operations.waits["_local_scalar_dense"] >= 2


@pytest.mark.parametrize("store", ["maps", "qkv"])
def test_loading_and_scoring_never_wait(
    example: Trace, tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = example if store == "maps" else record_vectors(tmp_path / "t", lengths=(160,))
    copies, per_block = [], []
    for steps in (16, 32, 64):
        waits, operations, blocks = counted(trace, steps, monkeypatch)
        assert not waits.waits, "nothing waits for the device"
        assert not operations.waits
        copies.append((waits.copies["to"] / blocks, waits.copies["tensor"]))
        per_block.append(operations.count / blocks)
    assert copies[0][0] == (2 if store == "maps" else 1), "a block is copied at once, with all its layers and rows"
    assert copies[0] == copies[1] == copies[2], "other copies are made once, whatever the number of blocks"
    assert max(per_block) < 1.1 * min(per_block), "the operations of a block do not grow with its steps"

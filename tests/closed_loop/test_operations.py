"""How many operations a pass launches on the code that a GPU runs.

A GPU is launch-bound: the number may not grow with the tokens of the text, only with its blocks. Reading a number of a
tensor, for which the host waits, is an operation too. They are counted on a CPU, with the Triton kernel in its
interpreter and the numba kernels off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvscope.closed_loop import forward
from kvscope.closed_loop.compile import evaluate
from kvscope.engine import simulation
from kvscope.kernels import triton_available
from kvscope.metrics import METRICS
from kvscope.model.attention_hook import Call
from kvscope.policies.base import recurrence_of
from kvscope.policies.spec import parse_policy
from tests.closed_loop.test_closed_loop import Kept, passage, runs
from tests.model.tiny import build

pytestmark = pytest.mark.skipif(not triton_available(), reason="triton is not installed: pip install triton")
MAY_COPY = {"aten::to", "aten::resolve_conj"}  # of `cpu` and `tolist`; torch counts them as views
METRICS_OF_ROWS = ["retained_mass", "ideal_mass", "ideal_cosine", "full_cosine", "read_keys", "held_keys"]


class Operations(TorchDispatchMode):
    """Counts operations, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view or func._schema.name in MAY_COPY:
            self.counts[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def launched(self) -> int:
        """Operations of all kinds."""
        return sum(self.counts.values())


@contextmanager
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Choose steppers and kernels on the CPU as on a GPU."""
    from kvscope.engine.triton_stepper import TritonStepper

    def choose(fallback: Any, inputs: Any, state: Any, sharing: Any) -> Any:
        rule = recurrence_of(inputs.plan.policy)
        return chosen(fallback, inputs, state, sharing) if rule is None else TritonStepper(inputs, state, rule)

    chosen = simulation.choose_stepper

    with monkeypatch.context() as patch:
        patch.setattr(simulation, "choose_stepper", choose)
        patch.setattr(forward, "available", lambda: False)
        patch.setattr(forward, "BLOCK_QUERIES", 1024)
        patch.setenv("KVSCOPE_NO_KERNELS", "1")
        yield


def counted(length: int, spec: str, metrics: list[str], prefill: str, monkeypatch: pytest.MonkeyPatch) -> Operations:
    model = build("llama")
    with as_on_a_gpu(monkeypatch), torch.inference_mode(), Operations() as operations:
        evaluate(
            model,
            [passage(length, length // 2)],
            runs((spec, "30%")),
            [METRICS.get(name) for name in metrics],
            prefill,
            Kept(),
        )
    return operations


CASES = [
    ("h2o", [], "full"),
    ("h2o", METRICS_OF_ROWS, "stream"),
    ("a2sf:alpha=0.5", [], "stream"),
    ("tova", METRICS_OF_ROWS, "full"),
    ("streaming-llm:sinks=1", [], "full"),
    ("vatp", [], "full"),
]


@pytest.mark.parametrize(("spec", "metrics", "prefill"), CASES)
def test_operations_do_not_grow_with_tokens(
    spec: str, metrics: list[str], prefill: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recurrence_of(parse_policy(spec)) is not None
    short, long = (counted(length, spec, metrics, prefill, monkeypatch) for length in (12, 24))
    grown = long.counts - short.counts
    assert not grown, f"of 12 more tokens: {dict(grown)}"


def test_what_grows_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that is stepped in torch launches operations for every token."""
    short, long = (counted(length, "lru", [], "full", monkeypatch) for length in (12, 24))
    assert long.launched > short.launched


@pytest.mark.parametrize("read", [int, bool, float, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.tolist])
def test_reading_a_number_is_counted(read: Callable[[torch.Tensor], object]) -> None:
    number = torch.ones(())
    with torch.inference_mode(), Operations() as operations:
        read(number)
    assert operations.launched > 0


def test_a_block_fits_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(**{field.name: None for field in fields(Call)})
    query = torch.empty(8, 32, 2048, 128, device="meta", dtype=torch.bfloat16)
    sized = replace(call, query=query)
    assert forward.block_size(sized) == forward.BLOCK_BYTES // (8 * 32 * 2048 * 4)
    assert forward.block_size(replace(call, query=query[:1, :, :64])) == forward.BLOCK_QUERIES

    class OnGpu:
        shape, device, dtype = query.shape, torch.device("cuda"), query.dtype

    for free, expected in ((80 * 2**30, 1024), (16 * 2**30, 256), (2**30, 64)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        assert forward.block_size(replace(call, query=OnGpu())) == expected  # type: ignore[arg-type]

"""How many operations a pass launches on the code that a GPU runs.

A GPU is launch-bound: the number may not grow with the tokens of the text, only with its blocks. Reading a number of a
tensor, for which the host waits, is an operation too. They are counted on a CPU, with the Triton kernel in its
interpreter and the numba kernels off.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from kvscope.closed_loop import compaction, forward
from kvscope.closed_loop.compile import evaluate
from kvscope.closed_loop.passage import Passage
from kvscope.core.options import Positions, Prefill
from kvscope.core.version import versions
from kvscope.kernels import triton_available
from kvscope.model.attention_hook import Call
from kvscope.policies import POLICIES
from kvscope.policies.base import Step, recurrence_of
from kvscope.policies.spec import parse_policy
from kvscope.trace.reader import TokenSequence
from tests.closed_loop.test_closed_loop import Kept, runs
from tools import operations
from tools.operations import FEW, LAYERS, MORE, PROMPT, Cost, Operations, closed, decoding, generating

pytestmark = pytest.mark.skipif(not triton_available(), reason="triton is not installed: pip install triton")
METRICS_OF_ROWS = ["retained_mass", "ideal_mass", "ideal_cosine", "full_cosine", "read_keys", "held_keys"]
RECORDED = json.loads(operations.OUTPUT.read_text(encoding="utf-8"))
STEPPED = [name for name, found in RECORDED["policies"].items() if found.get("token") and "Torch" in found["stepper"]]
DECODED = [name for name, found in RECORDED["policies"].items() if found.get("decoding")]
SAME_TORCH = {**versions("torch", "transformers"), "kvscope": ""} == {**RECORDED["versions"], "kvscope": ""}

CASES = [
    ("h2o", [], Prefill.full),
    ("h2o", METRICS_OF_ROWS, Prefill.stream),
    ("a2sf:alpha=0.5", [], Prefill.stream),
    ("tova", METRICS_OF_ROWS, Prefill.full),
    ("streaming-llm:sinks=1", [], Prefill.full),
    ("vatp", [], Prefill.full),
]


@pytest.mark.parametrize(("spec", "metrics", "prefill"), CASES)
def test_operations_do_not_grow_with_tokens(spec: str, metrics: list[str], prefill: Prefill) -> None:
    """A policy that the kernel steps launches as many operations for a longer text, in one block."""
    assert recurrence_of(parse_policy(spec)) is not None
    model = operations.small_model()
    short, long = (closed(model, spec, n // 2, n, prefill=prefill, metrics=metrics) for n in (24, 36))
    grown = long.counts - short.counts
    assert not grown, f"of 12 more tokens: {dict(grown)}"
    assert long.waits == short.waits


def test_every_policy_is_recorded() -> None:
    """The table in the documentation has all policies of the package, and those that can be decoded."""
    ours = [name for name, cls in POLICIES.items() if cls.__module__.startswith("kvscope.policies.")]
    assert sorted(RECORDED["policies"]) == sorted(ours)
    assert len(STEPPED) > 15
    assert len(DECODED) > 20


@pytest.mark.slow
@pytest.mark.parametrize("spec", STEPPED)
def test_a_token_that_torch_steps_costs_the_same_at_any_length(spec: str) -> None:
    model = operations.model_of(spec)
    layers = model.config.num_hidden_layers
    closed(model, spec, PROMPT, PROMPT + 1)  # loads a gate
    texts = [closed(model, spec, PROMPT, PROMPT + FEW + more) for more in (0, MORE, 2 * MORE)]
    first, second = (Cost.between(*pair, MORE * layers) for pair in pairwise(texts))
    assert first.waits == second.waits == 0
    assert first.operations == pytest.approx(second.operations, abs=1)  # some steps do more, such as those of a page
    if SAME_TORCH and not parse_policy(spec).phase.startswith("every"):
        assert first.operations == pytest.approx(RECORDED["policies"][spec]["token"]["operations"], abs=1)


@pytest.mark.parametrize("spec", ["lru", "morphkv", "cake", "snapkv", "quest", "recycled-attention"])
def test_heads_and_runs_are_stepped_together(spec: str) -> None:
    one, several = (
        [
            closed(operations.small_model(kv_heads=heads), spec, PROMPT, PROMPT + FEW + more, runs=runs)
            for more in (0, 8)
        ]
        for heads, runs in ((2, 1), (4, 4))
    )
    assert Cost.between(*several, 8) == Cost.between(*one, 8)


@pytest.mark.parametrize("spec", ["h2o", "snapkv", "cake", "morphkv", "r-kv", "full"])
def test_no_step_at_compacted_positions_waits(spec: str) -> None:
    model = operations.small_model()
    short, long = (
        closed(model, spec, PROMPT, PROMPT + more, runs=2, positions=Positions.compacted) for more in (4, 12)
    )
    assert not long.waits - short.waits


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["h2o", "tova", "snapkv", "cake", "keyformer", "r-kv", "full", operations.GATED])
def test_decoding_costs_less_than_three_plain_generations(spec: str) -> None:
    """In operations, of which a GPU can start so many a second; and no number of the host is waited for."""
    made = operations.model_of(spec)
    layers = made.config.num_hidden_layers
    decoding(made, spec, PROMPT, PROMPT + 2)  # loads a gate
    texts = [decoding(made, spec, PROMPT, PROMPT + FEW + more) for more in (0, 8, 16)]
    first, second = (Cost.between(*pair, 8) for pair in pairwise(texts))
    plain = Cost.between(*(generating(made, PROMPT, PROMPT + FEW + more) for more in (0, 8)), 8)
    assert first.operations == pytest.approx(second.operations, abs=2)
    assert first.operations < 3 * plain.operations
    assert (first.operations - plain.operations) / layers < 100
    assert first.waits == second.waits == (1 if spec == operations.GATED else 0)  # it has no budget that would tell


@pytest.mark.parametrize("spec", [name for name in DECODED if name not in operations.OF_DEMO])
def test_recorded_decoding_costs_less_than_three_plain_generations(spec: str) -> None:
    found, plain = RECORDED["policies"][spec]["decoding"], RECORDED["generate"]
    for layers in (1, 4, 32):
        cost, generate = (
            each["all_layers"]["operations"] + layers * each["each_layer"]["operations"] for each in (found, plain)
        )
        assert cost < 3 * generate
    traits = parse_policy(spec).traits
    counted = traits.bounded or traits.phase == "none"  # of others only the device can tell how many keys they hold
    assert found["all_layers"]["waits"] == (0 if counted else 1)
    assert found["each_layer"]["waits"] == 0


def test_decoding_costs_as_much_for_twice_the_heads() -> None:
    counts = []
    for heads in (2, 4):
        model = operations.small_model(kv_heads=heads)
        counts.append(Cost.between(*(decoding(model, "h2o", PROMPT, PROMPT + more) for more in (4, 8)), 4))
    assert counts[0] == counts[1]


def test_the_physical_cut_is_one_gather_in_each_layer() -> None:
    few, many = (
        [decoding(operations.small_model(layers), "h2o", PROMPT, PROMPT + more) for more in (4, 5)]
        for layers in (LAYERS, 2 * LAYERS)
    )
    of_a_token = [long.counts - short.counts for short, long in (few, many)]
    assert (of_a_token[1]["gather"] - of_a_token[0]["gather"]) / LAYERS == 1


def test_what_grows_is_counted() -> None:
    """A policy that is stepped in torch launches operations for every token."""
    model = operations.small_model()
    short, long = (closed(model, "lru", n // 2, n) for n in (24, 36))
    assert long.launched > short.launched + 12 * LAYERS


READS: list[Callable[[torch.Tensor], object]] = [
    *(int, bool, float, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.tolist),
    lambda number: number.nonzero(),
    lambda number: number[None][number[None] > 0],
    lambda number: torch.equal(number, number),
    lambda number: torch.tensor([1.0, 2.0]),
    lambda number: number[None].__setitem__(0, 3),
]


@pytest.mark.parametrize("read", READS)
def test_a_wait_is_counted_once(read: Callable[[torch.Tensor], object]) -> None:
    number = torch.ones(())
    with torch.inference_mode(), Operations() as found:
        read(number)
    assert found.waits.total() == 1


def test_views_and_composed_operations_are_not_counted_as_themselves() -> None:
    values = torch.ones(3, 4)
    with torch.inference_mode(), Operations() as found:
        values[1:].t().reshape(2, 4)[None]
        values.matmul(values.T)
    assert found.counts == Counter({"clone": 1, "mm": 1})
    assert not found.waits


@pytest.mark.parametrize(
    ("spec", "prefill"),
    [("h2o", "full"), ("tova", "stream"), ("attention-gate", "full"), ("full", "stream")],
)
def test_a_bound_on_the_keys_gives_what_their_number_gives(
    spec: str, prefill: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At compacted positions a GPU pads rows to a bound: no decision, and no loss but for rounding, depends on it."""
    model = operations.model_of(spec).double()
    bounds: list[int] = []

    def bound(step: Step, count: torch.Tensor) -> int:
        bounds.append(step.most_visible - int(count.max()))
        return step.most_visible

    exact, bounded = Kept(), Kept()
    text = Passage(TokenSequence(0, PROMPT, 60), operations.ids_of(60))
    evaluate(model, [text], runs((spec, "9"), (spec, "14"), positions="compacted"), [], prefill, exact)
    monkeypatch.setattr(compaction, "most_keys", bound)
    evaluate(model, [text], runs((spec, "9"), (spec, "14"), positions="compacted"), [], prefill, bounded)
    assert min(bounds) >= 0
    assert max(bounds) > 0 if spec == operations.GATED else max(bounds) == 0
    for run, losses in exact.losses.items():
        assert abs(losses["nll_policy"] - bounded.losses[run]["nll_policy"]).max() < 1e-9
    for place, intervals in exact.intervals.items():
        assert np.array_equal(intervals.leave, bounded.intervals[place].leave)


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

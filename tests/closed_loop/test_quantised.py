"""The closed loop with a quantised cache is decoding with a cache of codes that keys are removed from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kvscope.closed_loop.compile import compile_closed_loop
from kvscope.closed_loop.decode import attention_facts
from kvscope.closed_loop.job import ForwardPass
from kvscope.closed_loop.passage import Passage
from kvscope.closed_loop.verify import TOLERANCE, Verdict, VerifyJob
from kvscope.core.budget import parse_budgets
from kvscope.core.cache_scheme import parse_caches
from kvscope.core.errors import UsageError
from kvscope.core.options import Loop, Positions, Prefill
from kvscope.engine.cache_size import CACHE_BYTES
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec, runs_of
from kvscope.metrics import METRICS
from kvscope.model.derotation import derotations
from kvscope.policies.spec import parse_policy
from kvscope.trace.reader import TokenSequence
from tests.model.tiny import build, tokens
from tests.reference import quantised_decoder

LENGTH, PROMPT, BUDGET = 26, 12, 7
CACHES = (
    "int4:kivi(group=3,residual=6)",
    "int2:kivi(group=4,residual=4)",
    "int8:kivi(group=2,residual=8)",
    "int3:kvquant(group=5,outliers=5%)",
    "int2:kvquant(group=4,outliers=0%,first=0)",
    "int4:quanto(group=3,residual=5)",
    "int2:quanto(group=8,residual=1)",
    "fp8",
)
POLICIES = ("full", "h2o", "tova", "streaming-llm(sinks=2)", "snapkv(window=3)", "a2sf", "keydiff", "ada-kv(window=3)")


def runs(spec: str, caches: str = ",".join(CACHES), budget: int = BUDGET) -> list[RunSpec]:
    plan = EvictionPlan.published(parse_policy(spec))
    return runs_of([plan], parse_budgets(str(budget)), Loop.closed, Positions.original, parse_caches(caches))


def passage() -> Passage:
    return Passage(TokenSequence(0, PROMPT, LENGTH), tokens(LENGTH)[0])


def verdicts(model: Any, spec: str, prefill: str) -> list[Verdict]:
    job = compile_closed_loop(model, [passage()], runs(spec), [], Prefill(prefill))
    return VerifyJob(job, attention_facts(model, passage().ids[None])).execute()


def logits(model: Any, of: list[RunSpec], prefill: str) -> torch.Tensor:
    """Return logits ``[1 + R, S, V]`` of the closed loop."""
    with torch.inference_mode():
        job = compile_closed_loop(model, [passage()], of, [], Prefill(prefill))
        return ForwardPass(job, passage(), of).logits()


@pytest.mark.parametrize("spec", POLICIES)
@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_equal_to_decoding_with_a_shortened_cache(spec: str, prefill: str) -> None:
    if prefill not in EvictionPlan.published(parse_policy(spec)).policy.traits.prefills or (
        prefill == "stream" and EvictionPlan.published(parse_policy(spec)).phase == "prefill"
    ):
        return
    if prefill == "stream" and spec.startswith("ada-kv"):
        return
    for found in verdicts(build("llama").double(), spec, prefill):
        assert found.agrees and not found.different and found.logit_difference <= TOLERANCE, found


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "qwen3", "gpt_neox", "phi3"])
@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_other_architectures(name: str, prefill: str) -> None:
    """Sliding windows, capped logits, norms of keys, partial rotation: equal too."""
    for found in verdicts(build(name).double(), "h2o", prefill):
        assert found.agrees, found


@pytest.mark.parametrize("policy", quantised_decoder.POLICIES)
@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_equal_to_decoding_with_integer_codes(policy: str, prefill: str) -> None:
    """The reference keeps integer codes in Python lists, and removes evicted tokens from them."""
    model, text = build("llama").double(), passage()
    of = runs("streaming-llm(sinks=2)" if policy == "streaming-llm" else policy)
    closed = logits(model, of, prefill)[1:]
    start = PROMPT - 1 if prefill == "full" else 0
    with torch.no_grad():
        turns = derotations(model, text.ids[None, :1])
        for run, made in zip(of, closed, strict=True):
            assert run.cache is not None
            real, _ = quantised_decoder.decode(model, text.ids, run.cache, policy, BUDGET, PROMPT, prefill, turns)
            assert float((real[start:-1] - made).abs().max()) <= TOLERANCE, run.label


def test_fewer_bits_move_the_logits_farther() -> None:
    """Guards the tests above: codes change logits by more than the tolerance, and eviction changes what codes do."""
    model = build("llama").double()
    caches = "16bit,int8:kivi(group=4,residual=4),int4:kivi(group=4,residual=4),int2:kivi(group=4,residual=4)"
    for spec in ("full", "tova"):
        plain, *coded = logits(model, runs(spec, caches), "full")[1:]
        differences = [float((made - plain).abs().max()) for made in coded]
        assert differences == sorted(differences) and differences[0] > 1e4 * TOLERANCE


def test_codes_of_the_residual_window_come_later() -> None:
    """With a window longer than the text nothing is a code; logits are those of a cache in 16 bit, bit for bit."""
    model = build("llama").double()
    plain, coded = logits(model, runs("tova", "16bit,int2:kivi(group=32,residual=32)"), "full")[1:]
    assert float((plain - coded).abs().max()) <= 1e-12


def test_compacted_positions_are_refused() -> None:
    plan = EvictionPlan.published(parse_policy("h2o"))
    of = runs_of([plan], parse_budgets("7"), Loop.closed, Positions.compacted, parse_caches("int4"))
    with pytest.raises(UsageError, match="positions cannot be compacted with a cache in int4:kivi"):
        compile_closed_loop(build("llama"), [passage()], of, [], Prefill.full)


def test_a_decoder_that_quantises_one_step_late_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks the decoder's schedule, so that the comparison has something to find."""
    from kvscope.closed_loop.coded_cache import CodedCache

    after = CodedCache.after
    monkeypatch.setattr(CodedCache, "after", lambda self, tokens, parts: after(self, tokens - 1, parts))
    found = verdicts(build("llama").double(), "h2o", "stream")
    assert not any(one.agrees for one in found)


@pytest.mark.parametrize("policy", ["full", "h2o", "tova"])
@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_bytes_are_those_of_the_integer_codes(policy: str, prefill: str) -> None:
    """The size of every head at every step, counted from what the reference stores."""
    model, text, of = build("llama").double(), passage(), runs(policy)
    sink = Sizes()
    with torch.inference_mode():
        compile_closed_loop(model, [text], of, [CACHE_BYTES], Prefill(prefill)).execute(sink)
    start = PROMPT if prefill == "full" else 0
    with torch.no_grad():
        turns = derotations(model, text.ids[None, :1])
        for run in of:
            assert run.cache is not None
            _, layers = quantised_decoder.decode(model, text.ids, run.cache, policy, BUDGET, PROMPT, prefill, turns)
            for number, layer in enumerate(layers):
                by_head = sink.found[run.number, number]  # [H, S]
                share = len(by_head) // len(layer.heads)
                sizes = by_head[::share].sum(0)  # one query head of each key/value head
                expected = [bits / 8 for bits in layer.bits[-(LENGTH - start) :]]
                assert sizes.tolist() == expected, (run.label, number)


def test_metrics_of_codes_are_those_of_the_live_row() -> None:
    """Nothing is evicted: mass has no value, and the live row differs from the full one by what codes change."""
    model, sink = build("llama").double(), Sizes()
    metrics = [METRICS.get(name) for name in ("full_cosine", "output_error", "retained_mass")]
    of = runs("full", "int8:kivi(group=4,residual=4),int2:kivi(group=4,residual=4)")
    with torch.inference_mode():
        compile_closed_loop(model, [passage()], of, metrics, Prefill.full).execute(sink)
    fine, coarse = (
        {name: float(np.nanmean(sink.values[run, 0][name])) for name in ("full_cosine", "output_error")}
        for run in (0, 1)
    )
    assert 1 > fine["full_cosine"] > coarse["full_cosine"] > 0.5
    assert 0 < fine["output_error"] < coarse["output_error"] / 10
    assert np.isnan(sink.values[0, 0]["retained_mass"]).all()


class Sizes:
    """Keeps what a sink is given."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Any] = {}
        self.values: dict[tuple[int, int], Any] = {}

    def residency(self, *_: object) -> None:
        pass

    def tokens(self, *_: object) -> None:
        pass

    def fidelity(self, run: int, sequence: int, layer: int, steps: Any, values: Any) -> None:
        self.values[run, layer] = values
        self.found[run, layer] = values.get("cache_bytes")

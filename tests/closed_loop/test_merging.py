"""The closed loop with merging is decoding with a cache in which evicted keys are merged before they are removed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvscope.closed_loop.compile import compile_closed_loop
from kvscope.closed_loop.decode import attention_facts
from kvscope.closed_loop.job import ForwardPass
from kvscope.closed_loop.merged_cache import MergedCache
from kvscope.closed_loop.passage import Passage
from kvscope.closed_loop.verify import TOLERANCE, Verdict, VerifyJob
from kvscope.core.budget import parse_budgets
from kvscope.core.errors import UsageError
from kvscope.core.merge_scheme import parse_merges
from kvscope.core.options import Loop, Positions, Prefill
from kvscope.engine.cache_size import CACHE_BYTES
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import RunSpec, runs_of
from kvscope.metrics import METRICS
from kvscope.policies.spec import parse_policy
from kvscope.trace.reader import TokenSequence
from tests.closed_loop.test_quantised import Sizes
from tests.model.test_shared_caches import sharing
from tests.model.tiny import build, tokens
from tests.models import build as builder
from tests.reference import merged_decoder

LENGTH, PROMPT, BUDGET = 26, 12, 7
MERGES = (
    "cam",
    "cam(tokens=2,seed=3)",
    "cam(tokens=4,chance=max)",
    "d2o",
    "d2o(beta=0)",
    "d2o(beta=0.9)",
    "kvmerger(threshold=0.1)",
    "kvmerger(threshold=0)",
)
VERIFIED = "cam(tokens=2,seed=3),d2o,kvmerger(threshold=0.1)"
POLICIES = (
    *("h2o", "tova", "streaming-llm(sinks=2)", "snapkv(window=3)", "a2sf", "keydiff", "ada-kv(window=3)", "random"),
    *("union(tova,key-norm)", "snapkv(window=3,group=max)"),
)


def runs(spec: str, merges: str = VERIFIED, budget: int = BUDGET, **how: Any) -> list[RunSpec]:
    plan = EvictionPlan.published(parse_policy(spec))
    positions = how.get("positions", Positions.original)
    return runs_of([plan], parse_budgets(str(budget)), Loop.closed, positions, (), parse_merges(merges))


def passage() -> Passage:
    return Passage(TokenSequence(0, PROMPT, LENGTH), tokens(LENGTH)[0])


def verdicts(model: Any, spec: str, prefill: str, of: list[RunSpec] | None = None) -> list[Verdict]:
    job = compile_closed_loop(model, [passage()], of or runs(spec), [], Prefill(prefill))
    return VerifyJob(job, attention_facts(model, passage().ids[None])).execute()


def logits(model: Any, of: list[RunSpec], prefill: str) -> torch.Tensor:
    """Return logits ``[1 + R, S, V]`` of the closed loop."""
    with torch.inference_mode():
        job = compile_closed_loop(model, [passage()], of, [], Prefill(prefill))
        return ForwardPass(job, passage(), of).logits()


def runs_with(spec: str, prefill: str) -> bool:
    """Return whether a policy evicts token by token with streaming prefill, or with full prefill at all."""
    plan = EvictionPlan.published(parse_policy(spec))
    streams = prefill in plan.policy.traits.prefills and plan.phase != "prefill" and not spec.startswith("ada-kv")
    return prefill == "full" or streams


CASES = [(spec, prefill) for spec in POLICIES for prefill in ("full", "stream") if runs_with(spec, prefill)]


@pytest.mark.parametrize(("spec", "prefill"), CASES)
def test_equal_to_decoding_with_a_merged_cache(spec: str, prefill: str) -> None:
    """Grouped heads: 4 query heads over 2 key/value heads."""
    for found in verdicts(build("llama").double(), spec, prefill):
        assert found.agrees and not found.different and found.logit_difference <= TOLERANCE, found
        assert found.largest_cache < LENGTH


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3", "qwen3", "gpt_neox", "phi3", "gpt_oss"])
@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_other_architectures(name: str, prefill: str) -> None:
    """Sliding windows (of 5), capped logits, norms of keys, partial rotation, learned sinks: equal too."""
    single = name == "gpt_oss"  # its experts are not computed in float64
    for found in verdicts(build(name) if single else build(name).double(), "h2o", prefill, runs("h2o", budget=4)):
        assert not found.different and found.logit_difference <= (1e-6 if single else found.tolerance), found


def test_layers_that_attend_in_chunks(tmp_path: Path) -> None:
    """Chunks of 8: nothing is merged into a key of a chunk that has ended."""
    model = AutoModelForCausalLM.from_pretrained(builder.saved(tmp_path / "model", "llama4_text")).eval().double()
    for found in verdicts(model, "h2o", "stream", runs("h2o", budget=4)):
        assert found.agrees and not found.different, found


@pytest.mark.parametrize("policy", [name for name in merged_decoder.POLICIES if name != "full"])
@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_equal_to_merging_by_hand(policy: str, prefill: str) -> None:
    """The reference keeps keys and values in Python lists, merges them by hand, and then removes what is evicted."""
    model, text = build("llama").double(), passage()
    of = runs("streaming-llm(sinks=2)" if policy == "streaming-llm" else policy, ",".join(MERGES))
    closed = logits(model, of, prefill)[1:]
    start = PROMPT - 1 if prefill == "full" else 0
    with torch.no_grad():
        for run, made in zip(of, closed, strict=True):
            assert run.merge is not None
            real, _ = merged_decoder.decode(model, text.ids, run.merge, policy, BUDGET, PROMPT, prefill)
            assert float((real[start:-1] - made).abs().max()) <= TOLERANCE, run.label


def test_every_rule_changes_the_logits() -> None:
    """Guards the tests above: every rule gives other logits than eviction alone, and than every other rule."""
    model = build("llama").double()
    for spec in ("tova", "streaming-llm(sinks=2)"):
        found = logits(model, runs(spec, f"none,{','.join(MERGES)}"), "stream")[1:]
        apart = [float((one - other).abs().max()) for at, one in enumerate(found) for other in found[:at]]
        assert min(apart) > 1e3 * TOLERANCE


@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_equal_to_the_full_cache_where_nothing_is_evicted(prefill: str) -> None:
    found = logits(build("llama").double(), runs("h2o", budget=LENGTH), prefill)
    assert float((found[1:] - found[:1]).abs().max()) <= 1e-15


def test_the_draws_depend_on_the_seed() -> None:
    found = logits(build("llama").double(), runs("h2o", "cam,cam(seed=1)"), "full")[1:]
    again = logits(build("llama").double(), runs("h2o", "cam,cam(seed=1)"), "full")[1:]
    assert torch.equal(found, again)
    assert float((found[0] - found[1]).abs().max()) > 1e3 * TOLERANCE


def test_runs_of_several_budgets_are_those_of_each_alone() -> None:
    """A batch has its own threshold and its own sums for every run."""
    model, plan = build("llama").double(), EvictionPlan.published(parse_policy("h2o"))
    of = runs_of([plan], parse_budgets("5,7,9"), Loop.closed, Positions.original, (), parse_merges("d2o"))
    together = logits(model, of, "stream")[1:]
    for run, made in zip(of, together, strict=True):
        assert float((logits(model, [run], "stream")[1] - made).abs().max()) <= 1e-12


def test_compacted_positions_are_refused() -> None:
    with pytest.raises(UsageError, match="positions cannot be compacted with --merge d2o"):
        compile_closed_loop(
            build("llama"), [passage()], runs("h2o", "d2o", positions=Positions.compacted), [], Prefill.full
        )


def test_policies_that_hold_every_key_are_refused() -> None:
    with pytest.raises(UsageError, match="quest holds every key, so cam has nothing to merge"):
        compile_closed_loop(build("llama"), [passage()], runs("quest", "cam"), [], Prefill.full)


@pytest.mark.parametrize(
    ("name", "why"), [("deepseek_v3", "caches latent vectors"), ("gemma3n_text", "read the cache of another layer")]
)
def test_latent_and_shared_caches_are_refused(
    name: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "gemma3n_text":
        monkeypatch.setattr(builder, "config_of", sharing)
    model = AutoModelForCausalLM.from_pretrained(builder.saved(tmp_path / "model", name)).eval()
    with pytest.raises(UsageError, match=rf"{why}.*\n.*omit --merge"):
        compile_closed_loop(model, [passage()], runs("h2o", "d2o"), [], Prefill.full)


def test_a_decoder_that_merges_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks the decoder, so that the comparison has something to find."""
    monkeypatch.setattr(MergedCache, "before", lambda *_: None)
    found = verdicts(build("llama").double(), "h2o", "stream")
    assert not any(one.agrees for one in found)


def test_metrics_are_those_of_the_live_row() -> None:
    """`output_error` reads merged values; what depends only on which keys are held is as without merging."""
    model, sink = build("llama").double(), Sizes()
    names = ("full_cosine", "output_error", "retained_mass", "held_keys")
    of = runs("streaming-llm(sinks=2)", "none,cam,d2o")
    metrics = [*(METRICS.get(name) for name in names), CACHE_BYTES]
    with torch.inference_mode():
        compile_closed_loop(model, [passage()], of, metrics, Prefill.full).execute(sink)
    plain, cam, d2o = (sink.values[run, 0] for run in range(3))  # layer 0: rows are those of the same queries
    for name in ("retained_mass", "held_keys", "cache_bytes"):
        np.testing.assert_array_equal(cam[name], plain[name])
        np.testing.assert_array_equal(d2o[name], plain[name])
    np.testing.assert_allclose(cam["full_cosine"], plain["full_cosine"], rtol=1e-6)  # CaM leaves keys as they are
    assert np.nanmax(np.abs(d2o["full_cosine"] - plain["full_cosine"])) > 1e-4
    for merged in (cam, d2o):
        assert np.nanmax(np.abs(merged["output_error"] - plain["output_error"])) > 1e-3
    assert re.fullmatch(r"streaming-llm\(sinks=2\) \+ d2o", of[2].label)

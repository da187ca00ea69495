"""The closed loop compared with real decoding: the same keys at every step, the same logits."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kvscope.closed_loop.compile import compile_closed_loop
from kvscope.closed_loop.decode import attention_facts
from kvscope.closed_loop.feasible import require_closed, require_decodable
from kvscope.closed_loop.passage import Passage
from kvscope.closed_loop.verify import TOLERANCE, Verdict, VerifyJob
from kvscope.core.budget import parse_budgets
from kvscope.core.errors import UsageError
from kvscope.core.options import Loop, Prefill
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.runs import runs_of
from kvscope.policies import POLICIES
from kvscope.policies.base import Policy, Step
from kvscope.policies.spec import parse_policy
from kvscope.trace.reader import TokenSequence
from tests.model.tiny import build, tokens

LENGTH, PROMPT, BUDGET = 26, 12, "7"
# Parameters for short texts; policies that are not listed run with their defaults.
SMALL = {
    "snapkv": "snapkv:window=3",
    "pyramidkv": "pyramidkv:window=3",
    "headkv": "headkv:window=3",
    "ada-kv": "ada-kv:window=3",
    "lagkv": "lagkv:lag=3,sinks=2",
    "r-kv": "r-kv:window=3",
    "duo-attention": "duo-attention:recent=3,sinks=1,threshold=0.7",
    "simlayerkv": "simlayerkv:rows=2,recent=3,sinks=1,threshold=0.3",
    "compactor": "compactor:sinks=2,recent=1,chunk=5,sketch=4",
    "curdkv": "curdkv:sinks=1,window=4",
    "criticalkv": "criticalkv:base=snapkv(window=3)",
    "expected-attention": "expected-attention:sinks=2,future=9",
}
OTHER_MODELS = ["qwen3", "gemma3", "gpt_neox", "phi3"]
SOME = ["h2o", "tova", "a2sf", "keyformer", "ada-kv:window=3"]


def specs() -> list[str]:
    """Return every registered policy that evicts, with parameters for short texts."""
    found = []
    for name in POLICIES.names():
        if name in ("attention-gate", "dms", "q-filters", "kvzap", "kvzip", "fastgen"):
            continue  # needs a gate of the model: tests/gates/test_loops.py
        spec = SMALL.get(name, name)
        plan = EvictionPlan.published(parse_policy(spec))
        try:
            require_closed(plan)
            require_decodable(plan)
            if name == "attention-gate":  # needs a gate of the model: tests/gates/test_loops.py
                continue
        except UsageError:
            continue
        found.append(spec)
    made_of_two = ["switch(full, h2o, layers=0)", "union(h2o, key-norm)"]
    return [*found, *made_of_two, "tova:scope=kv_head", "vatp:base=tova", "h2o:group=max"]


def verdict(model: Any, spec: str, prefill: str, positions: str = "original", budget: str = BUDGET) -> Verdict:
    return compared(model, EvictionPlan.published(parse_policy(spec)), prefill, positions, budget)


def compared(
    model: Any, plan: EvictionPlan, prefill: str, positions: str = "original", budget: str = BUDGET
) -> Verdict:
    (run,) = runs_of([plan], parse_budgets(budget), loop="closed", positions=positions)  # type: ignore[arg-type]
    passage = Passage(TokenSequence(0, PROMPT, LENGTH), tokens(LENGTH)[0])
    job = compile_closed_loop(model, [passage], [run], [], Prefill(prefill))
    (found,) = VerifyJob(job, attention_facts(model, passage.ids[None])).execute()
    return found


@pytest.mark.parametrize("spec", specs())
def test_every_policy_that_evicts(spec: str) -> None:
    model, plan = build("llama").double(), EvictionPlan.published(parse_policy(spec))
    for prefill in sorted(plan.policy.traits.prefills):
        if prefill == "stream" and plan.phase == "prefill":
            continue
        found = verdict(model, spec, prefill)
        assert found.decided and found.agrees, found
        assert found.different == 0 and found.logit_difference <= TOLERANCE


@pytest.mark.parametrize("spec", SOME)
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_architectures(name: str, spec: str) -> None:
    found = verdict(build(name).double(), spec, "full")
    assert found.agrees, found


@pytest.mark.parametrize("name", ["llama", *OTHER_MODELS])
def test_compacted_positions(name: str) -> None:
    for spec in ("streaming-llm:sinks=2", "h2o"):
        found = verdict(build(name).double(), spec, "stream", "compacted")
        assert found.agrees, found


@dataclass(frozen=True)
class Threshold(Policy):
    """Evicts keys below a share of the attention, so that heads hold different numbers of keys."""

    name = "threshold"
    bounded = False

    def observe(self, step: Step, score: Tensor) -> Tensor:
        weights = step.weights()
        weights[..., -1] = 1  # the newest key is never evicted
        return torch.where(weights < 0.08, -torch.inf, weights)


def test_a_policy_without_a_budget() -> None:
    plan = EvictionPlan.published(Threshold())
    for prefill in ("full", "stream"):
        found = compared(build("llama").double(), plan, prefill)
        assert found.agrees and found.largest_cache < LENGTH, found


def test_progress_is_told_after_every_decoded_token() -> None:
    model, told = build("llama"), list[float]()
    runs = runs_of([EvictionPlan.published(parse_policy("h2o"))], parse_budgets("5,7"), loop=Loop.closed)
    passage = Passage(TokenSequence(0, PROMPT, LENGTH), tokens(LENGTH)[0])
    job = compile_closed_loop(model, [passage], runs, [], Prefill.full)
    VerifyJob(job, attention_facts(model, passage.ids[None])).execute(told.append)
    assert told == sorted(told) and told[-1] == 1
    decoded = LENGTH - PROMPT
    assert len(told) == 4 * decoded + 1, "the model alone, which also reads its prompt, a full cache, and two budgets"
    for decoding in range(4):
        assert sum(decoding / 4 < share <= (decoding + 1) / 4 for share in told) == decoded + (decoding == 0)


def test_the_cache_is_physically_short() -> None:
    found = verdict(build("llama").double(), "h2o", "stream")
    assert found.largest_cache == found.keys == 7


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder whose policy ignores one step is detected."""
    from kvscope.policies.a2sf import A2SF

    model = build("llama").double()
    assert verdict(model, "a2sf:alpha=0.5", "stream").agrees
    observe, calls = A2SF.observe, []

    def forgetful(self: A2SF, step: Any, score: torch.Tensor) -> torch.Tensor:
        calls.append(step.t)
        return observe(self, step, score if step.t != 9 or calls.count(9) < 3 else score * 0)

    monkeypatch.setattr(A2SF, "recurrence", lambda self: None)  # so that `observe` is used and not the kernel
    monkeypatch.setattr(A2SF, "observe", forgetful)  # called for two layers in the closed loop, then by decoding
    found = verdict(model, "a2sf:alpha=0.5", "stream")
    assert not found.agrees
    assert found.first_difference is not None and found.first_difference >= 9


def test_float32_is_measured_and_not_judged() -> None:
    found = verdict(build("llama"), "tova", "full")
    assert not found.decided
    assert found.logit_difference < 1e-3 or found.different


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_part_in_float32_is_no_difference(name: str) -> None:
    """Gemma 2 makes its softmax in float32, whatever the dtype of the model: the tolerance follows from that."""
    model = build(name).double()
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # as the model is loaded in float64
    found = verdict(model, "tova", "full")
    assert found.decided and found.agrees, found
    assert not found.model_differs and found.tolerance < 1e-5
    assert (found.tolerance > TOLERANCE) == (name == "gemma2"), found


def test_a_model_that_decodes_to_other_logits_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").double()
    forward = type(model).forward

    def differs(self: Any, input_ids: Tensor, past_key_values: Any = None, **options: Any) -> Any:
        output = forward(self, input_ids=input_ids, past_key_values=past_key_values, **options)
        if past_key_values is not None and input_ids.shape[1] == 1:
            output.logits = output.logits + 0.01 * torch.arange(output.logits.shape[-1])
        return output

    monkeypatch.setattr(type(model), "forward", differs)
    found = verdict(model, "tova", "full")
    assert found.model_differs and found.model_difference > 0.1
    assert not found.agrees and found.tolerance <= 1e-4

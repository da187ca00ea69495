"""StreamingLLM against the published cache."""

import pytest

from kvscope.core.errors import UsageError
from kvscope.policies.spec import parse_policy
from tests.policies.decisions import LENGTH, PROMPTS_BUDGETS, simulations
from tests.reference.policies import streaming_llm as reference


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("sinks", [0, 1, 4])
def test_decisions_equal_the_published_cache(sinks: int, prefill: str) -> None:
    cases = [(prompt, budget) for prompt, budget in [*PROMPTS_BUDGETS, (14, 4)] if budget >= sinks]
    for _, visible, held, prompt, budget in simulations(f"streaming-llm:sinks={sinks}", prefill, cases):
        assert (visible, held) == reference.cache(LENGTH, sinks, budget - sinks, prompt, prefill)


def test_traits_and_mistakes() -> None:
    assert parse_policy("streaming-llm").protect(10).sinks == 4
    assert not parse_policy("streaming-llm").traits.needs, "it reads nothing"
    with pytest.raises(UsageError, match="out of range"):
        parse_policy("streaming-llm:sinks=-1")

"""TOVA per layer, per head and at the end of the prompt alone, against plain loops and the released code's sets."""

import pytest

import kvscope.policies.tova  # noqa: F401
from kvscope.core.errors import UsageError
from kvscope.policies.spec import parse_policies
from tests.engine.maps import attention, run
from tests.policies.decisions import LENGTH, golden, golden_simulation, heads_at, simulations
from tests.reference.policies import tova as reference


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("scope", ["layer", "kv_head"])
@pytest.mark.parametrize("sinks", [0, 1])
def test_decisions_equal_the_plain_loop(prefill: str, scope: str, sinks: int) -> None:
    for rows, visible, held, prompt, budget in simulations(f"tova:scope={scope},sinks={sinks}", prefill):
        assert (visible, held) == reference.tova(rows, budget, prompt, prefill, sinks)


@pytest.mark.parametrize("group", ["max", "sum"])
def test_other_group_reductions(group: str) -> None:
    for rows, visible, held, prompt, budget in simulations(f"tova:scope=kv_head,group={group}", "full"):
        assert (visible, held) == reference.tova(rows, budget, prompt, "full", group=group)


def test_four_sinks_stay() -> None:
    for _, _, held, prompt, _ in simulations("tova:sinks=4", "full", [(12, 6)]):
        assert all(keys >= {0, 1, 2, 3} for keys in held[prompt - 1 :])


@pytest.mark.parametrize("sinks", [0, 1])
def test_kvpress_chooses_once_and_keeps_the_last_key(sinks: int) -> None:
    lost = 0
    cases = [(1, 5), (4, 9), (9, 9), (17, 6), (LENGTH - 1, 2), (12, 2), (20, LENGTH)]
    plain = simulations(f"tova:sinks={sinks}", "full", cases)
    for (rows, visible, held, prompt, budget), usual in zip(
        simulations(f"tova:variant=kvpress,sinks={sinks}", "full", cases), plain, strict=True
    ):
        kept = reference.kvpress(rows, budget, prompt, sinks)
        assert held[prompt - 1 :] == [kept | set(range(prompt, t + 1)) for t in range(prompt - 1, LENGTH)]
        assert visible[prompt:] == held[prompt:]
        lost += prompt - 1 not in usual[2][prompt - 1]
    assert lost > 0, "the plain rule never evicts the last key here, so keeping it shows nothing"


def test_golden() -> None:
    expected = golden("tova", "released")
    held = golden_simulation("tova", 6, "full").held(0, 20)
    assert heads_at(held, 11) == [expected["cache_after_prefill_shared"]] * 2
    assert heads_at(held, 19) == [expected["cache_final_shared"]] * 2


def test_traits_follow_the_parameters() -> None:
    per_head, press = parse_policies(["tova:scope=kv_head", "tova:variant=kvpress"])
    assert per_head.traits.scope == "kv_head" and not per_head.traits.published
    assert (press.traits.scope, press.traits.phase, press.traits.published) == ("layer", "prefill", True)
    with pytest.raises(UsageError, match="not defined for stream prefill"):
        run(press, attention(1, 1, 2, 12), [5], kv_heads=2, prompt=1, prefill="stream")
    with pytest.raises(UsageError, match="out of range"):
        parse_policies(["tova:sinks=-1"])

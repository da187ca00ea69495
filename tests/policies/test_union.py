"""Unions of two policies against a plain loop, and what may be a member of any combination."""

import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.policies.base import Protection
from kvscope.policies.cited import cited_by, cited_in
from kvscope.policies.spec import parse_policies, parse_policy
from kvscope.policies.union import Union
from tests.engine.maps import attention, run
from tests.policies.decisions import simulations
from tests.reference.policies.combined import combined, last_row, newest, summed

CASES = [(1, 5), (4, 9), (9, 9), (17, 6), (25, 1), (12, 3), (20, 26), (3, 25)]


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize(
    ("spec", "members", "protected"),
    [
        ("union(h2o(recent=0), tova(scope=kv_head))", (summed, last_row), {}),
        ("union(a2sf(alpha=0.7), window)", (lambda: summed(0.7), newest), {}),
        ("union(window, h2o(recent=2))", (newest, summed), {"recent": 2}),
        ("union(h2o(recent=1), tova(scope=kv_head, sinks=1))", (summed, last_row), {"sinks": 1, "recent": 1}),
    ],
)
def test_decisions_equal_the_plain_loop(spec: str, members: tuple, protected: dict, prefill: str) -> None:
    cases = [case for case in CASES if case[1] > 4]
    for rows, visible, held, prompt, budget in simulations(spec, prefill, cases):
        assert (visible, held) == combined(rows, budget, prompt, prefill, members[0](), members[1](), **protected)


def test_a_policy_with_itself_is_that_policy() -> None:
    rows = attention(3, 2, 4, 40)
    for member in ("h2o", "tova", "a2sf(alpha=0.7)", "snapkv(window=3)", "window"):
        at = {"kv_heads": 2, "prompt": 20, "prefill": "full"}
        for name in (f"union({member}, {member})", f"blend({member}, {member}, weight=0.3)"):
            made, alone = run(parse_policy(name), rows, [11], **at), run(parse_policy(member), rows, [11], **at)
            assert torch.equal(made.visible(0, 40), alone.visible(0, 40)), name


def test_half_of_the_choices_are_those_of_each() -> None:
    """Of 12 keys at the end of the prompt each policy has its best six, unless the other chose them too."""
    rows = attention(5, 1, 2, 40)
    at = {"kv_heads": 2, "prompt": 40, "prefill": "full"}
    held = run(parse_policy("union(a2sf(alpha=1), tova(scope=kv_head))"), rows, [12], **at).held(39, 40)[0, 0, :, 0]
    for member in ("a2sf(alpha=1)", "tova(scope=kv_head)"):
        best = run(parse_policy(member), rows, [6], **at).held(39, 40)[0, 0, :, 0]
        assert (held | ~best).all()


def test_forms_of_text_and_labels() -> None:
    short, long, code = parse_policies(
        ["union(a2sf(alpha=0.7), tova(sinks=4))", "union:a=h2o,b=streaming-llm", "union(tova, b=h2o(recent=3))"]
    )
    assert short.label == "union(a=a2sf(alpha=0.7), b=tova(sinks=4))"
    assert long.label == "union(b=streaming-llm)"
    assert code == Union(a="tova", b="h2o(recent=3)") == parse_policy(code.label)
    assert code.parameters() == {"a": "tova", "b": "h2o(recent=3)"}
    nested = parse_policy("union(union(h2o, tova), blend(a2sf, window, weight=0.2))")
    assert parse_policy(nested.label) == nested


def test_protected_are_the_larger_numbers() -> None:
    made = parse_policy("union(streaming-llm(sinks=2), h2o(recent=3))")
    assert made.protect(12) == Protection(sinks=2, recent=3)
    assert made.traits.needs == {"weights"} and made.traits.scope == "kv_head"
    assert parse_policy("union(tova, window)").traits.scope == "layer"


@pytest.mark.parametrize("name", ["union", "blend", "switch"])
@pytest.mark.parametrize(
    ("member", "why"),
    [
        ("belady", "it is a bound"),
        ("quest", "it reads a part"),
        ("h2o(variant=mask)", "it reads a part|it reproduces published code"),
        ("simlayerkv", "it holds to no budget"),
        ("snapkv", "they evict at different times"),
        ("nothing", "no policy is called"),
    ],
)
def test_what_cannot_be_a_member(name: str, member: str, why: str) -> None:
    for spec in (f"{name}({member}, h2o)", f"{name}(h2o, {member})"):
        with pytest.raises(UsageError, match=why) as found:
            parse_policy(spec)
        assert len(str(found.value).splitlines()) == 2


def test_full_is_a_member_of_a_switch_alone() -> None:
    for spec in ("union(full, h2o)", "blend(h2o, full)", "switch(full, full)"):
        with pytest.raises(UsageError, match="it evicts nothing"):
            parse_policy(spec)


def test_publications_of_the_members_are_cited() -> None:
    made = parse_policies(["union(vatp(base=a2sf), tova)"])
    keys = [source.citation.key for source in cited_by(made) if source.citation]
    assert keys == ["guo2024vatp", "jo2024a2sf", "oren2024tova"]
    one = made[0]
    recorded = cited_in(one.name, one.label, one.parameters(), "uniform")
    assert [source.citation.key for source in recorded if source.citation] == keys


def test_too_many_settings_without_a_name() -> None:
    for spec in ("union(h2o, tova, window)", "a2sf(0.7)"):
        with pytest.raises(UsageError, match="is not a setting"):
            parse_policy(spec)

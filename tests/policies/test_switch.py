"""Switches between two policies: each layer is as with the policy of that layer alone."""

import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.engine.plan import EvictionPlan
from kvscope.policies.spec import parse_policies, parse_policy
from kvscope.policies.switch import Switch
from tests.engine.maps import attention, run
from tests.policies.decisions import sets
from tests.reference.policies.combined import combined, last_row, summed

LENGTH = 40


@pytest.mark.parametrize("prefill", ["full", "stream"])
def test_each_layer_equals_its_plain_loop(prefill: str) -> None:
    rows = attention(6, 3, 4, LENGTH)
    spec = "switch(h2o(recent=0), tova(scope=kv_head), layers=(0,2))"
    held = run(parse_policy(spec), rows, [9], kv_heads=4, prompt=18, prefill=prefill).held(0, LENGTH)[0]
    for layer in range(3):
        member = last_row if layer == 1 else summed
        for head in range(4):
            of_head = rows[layer, head : head + 1].numpy()
            assert sets(held[layer, head]) == combined(of_head, 9, 18, prefill, member(), member())[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("tova", "a2sf"),
        ("snapkv(window=3)", "chunkkv(window=3,chunk=4)"),
        ("window", "keydiff"),
        ("tova", "lacache(sinks=0)"),
    ],
)
def test_each_layer_is_as_with_its_policy_alone(one: str, other: str) -> None:
    rows = attention(6, 4, 4, LENGTH)
    at = {"kv_heads": 2, "prompt": 22, "prefill": "full"}
    made = run(parse_policy(f"switch({one}, {other}, layers=1-2)"), rows, [11], **at).visible(0, LENGTH)
    for member, layers in ((one, [1, 2]), (other, [0, 3])):
        plan = EvictionPlan.published(parse_policy(member))
        alone = run(plan, rows, [11], **at).visible(0, LENGTH)
        assert torch.equal(made[:, layers], alone[:, layers])


def test_full_layers_hold_every_key_and_the_others_the_budget() -> None:
    rows = attention(6, 4, 4, LENGTH)
    at = {"kv_heads": 2, "prompt": 22, "prefill": "full"}
    for spec, whole in (("switch(full, h2o, layers=0-1)", [0, 1]), ("switch(h2o, full, layers=(0,3))", [1, 2])):
        made = run(parse_policy(spec), rows, [11], **at)
        others = [layer for layer in range(4) if layer not in whole]
        held = made.held(LENGTH - 1, LENGTH)[0, :, :, 0].sum(-1)
        assert (held[whole] == LENGTH).all() and (held[others] == 11).all()
        alone = run(parse_policy("h2o"), rows, [11], **at).visible(0, LENGTH)
        assert torch.equal(made.visible(0, LENGTH)[:, others], alone[:, others])


def test_layers_in_their_shortest_form() -> None:
    forms = ["switch(a2sf, tova, layers=0-3)", "switch(a2sf, layers=(0,1,2,3))", "switch:a=a2sf,layers=(3,0-2)"]
    assert {parse_policy(each).label for each in forms} == {"switch(a=a2sf, layers=0-3)"}
    assert parse_policy("switch(tova, h2o, layers=(5,0,1))") == Switch(a="tova", b="h2o", layers="0-1,5")
    (again,) = parse_policies([Switch(a="tova", b="h2o", layers="0-1,5").label])
    assert again == Switch(a="tova", b="h2o", layers="(0-1,5)")


@pytest.mark.parametrize("layers", ["3-1", "x", "()", "-1"])
def test_what_names_no_layers(layers: str) -> None:
    with pytest.raises(UsageError, match="names no layers"):
        parse_policy(f"switch(tova, h2o, layers={layers})")


def test_layers_that_the_model_does_not_have() -> None:
    for spec, layers in (("switch(tova, h2o, layers=0-4)", 4), ("switch(tova, h2o, layers=0-3)", 4)):
        with pytest.raises(UsageError, match="the model has layers 0 to 3"):
            parse_policy(spec).fit((0,), 2, layers)
    parse_policy("switch(tova, h2o, layers=0-2)").fit((0,), 2, 4)

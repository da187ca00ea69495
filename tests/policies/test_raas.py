"""RaaS against its plain-loop reference."""

import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.policies.raas import RaaS
from kvscope.policies.spec import parse_policy
from tests.engine.maps import attention, run
from tests.policies.decisions import LENGTH, PROMPTS_BUDGETS, simulations
from tests.reference.policies.raas import raas

CASES = [*PROMPTS_BUDGETS, (4, 7), (6, 7), (7, 7), (5, 12), (10, 14)]  # the prompt leaves room in some


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        ("raas", {"page": 16}),
        ("raas:page=1,alpha=0.02", {"page": 1, "alpha": 0.02}),
        ("raas:page=3,alpha=0.05", {"page": 3, "alpha": 0.05}),
        ("raas:page=2,alpha=0.1,group=max", {"page": 2, "alpha": 0.1, "group": "max"}),
        ("raas:page=1,share=0.5", {"page": 1, "share": "0.5"}),
        ("raas:page=3,share=0.3,keep_prompt=false", {"page": 3, "share": "0.3", "keep": False}),
        ("raas:page=1,alpha=0.1,keep_prompt=false", {"page": 1, "alpha": 0.1, "keep": False}),
    ],
)
def test_decisions_equal_the_plain_loop(spec: str, settings: dict, prefill: str) -> None:
    for rows, visible, held, prompt, budget in simulations(spec, prefill, CASES):
        assert (visible, held) == raas(rows, budget, prompt, prefill, **settings)


def test_the_prompt_stays_where_it_leaves_room() -> None:
    rows = attention(3, 2, 4, 40)
    for budget in (11, 18):
        held = run(parse_policy("raas:page=2,alpha=0.05"), rows, [budget], kv_heads=2, prompt=10, prefill="full")
        assert held.held(0, 40)[..., :10][..., 10:, :].all()
    held = run(parse_policy("raas:page=2,alpha=0.05"), rows, [10], kv_heads=2, prompt=10, prefill="full")
    assert not held.held(0, 40)[..., -1, :10].all()


def test_a_milestone_goes_once_it_is_no_longer_used() -> None:
    """Key 6 is used by rows 6 to 14 and by none after them: it is evicted, though it has most of the weight so far."""
    rows = torch.full((1, 1, 40, 40), 1e-6, dtype=torch.float64).tril()
    rows.diagonal(dim1=-2, dim2=-1).fill_(0.5)
    rows[..., 7:15, 6] = 0.9
    rows = rows / rows.sum(-1, keepdim=True)
    held = run(RaaS(page=1, alpha=0.01), rows, [12], kv_heads=1, prompt=4, prefill="full").held(0, 40)[0, 0, 0]
    last = int(held[:, 6].nonzero().max())
    h2o = run(parse_policy("h2o:recent=1"), rows, [12], kv_heads=1, prompt=4, prefill="full").held(0, 40)[0, 0, 0]
    assert 15 < last < 24 and h2o[-1, 6]


@pytest.mark.parametrize("setting", ["page=0", "alpha=-1", "share=1.5"])
def test_what_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match=setting.split("=")[0]):
        parse_policy(f"raas:{setting}")


def test_the_defaults_are_those_of_the_paper() -> None:
    assert parse_policy("raas").parameters() == {
        "page": 16,
        "alpha": 0.0001,
        "share": None,
        "keep_prompt": True,
        "group": "mean",
    }
    assert LENGTH > 16, "the default has several pages here"

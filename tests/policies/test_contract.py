"""What every registered policy promises, whatever its rule. A new policy is tested by being registered."""

from itertools import product

import pytest
import torch

from kvscope.policies import POLICIES
from kvscope.policies.base import Policy
from kvscope.policies.spec import describe, parse_policies
from tests.replay.maps import attention, run

BOUNDED = [name for name, cls in POLICIES.items() if cls.bounded]
PREFILLS = ["full", "stream"]
LENGTH, PROMPT, BUDGET = 48, 20, 12


def policy(name: str) -> Policy:
    return parse_policies([name])[0]


@pytest.mark.parametrize(("name", "prefill"), list(product(BOUNDED, PREFILLS)))
def test_budget_is_kept_at_every_step(name: str, prefill: str) -> None:
    scan = run(policy(name), attention(1, 2, 4, LENGTH), [BUDGET], kv_heads=2, prompt=PROMPT, prefill=prefill)
    held = scan.held(0, LENGTH).sum(-1)
    first = PROMPT - 1 if prefill == "full" else 0
    assert held[..., first:].max() == BUDGET
    assert (scan.visible(0, LENGTH).sum(-1)[..., first + 1 :] <= BUDGET + 1).all()


@pytest.mark.parametrize(("name", "prefill"), list(product(POLICIES.names(), PREFILLS)))
def test_nothing_comes_back(name: str, prefill: str) -> None:
    scan = run(policy(name), attention(2, 2, 4, LENGTH), [BUDGET], kv_heads=2, prompt=PROMPT, prefill=prefill)
    held = scan.held(0, LENGTH)
    before, after = held[..., :-1, :], held[..., 1:, :]
    new = after & ~before
    keys = new.nonzero()
    assert (keys[:, -1] == keys[:, -2] + 1).all(), "only the current key may be new"


@pytest.mark.parametrize(("name", "prefill"), list(product(BOUNDED, PREFILLS)))
def test_protected_keys_stay(name: str, prefill: str) -> None:
    made = policy(name)
    scan = run(made, attention(3, 2, 4, LENGTH), [BUDGET], kv_heads=2, prompt=PROMPT, prefill=prefill)
    protection = made.protect(BUDGET)
    held = scan.held(0, LENGTH)
    for t in range(LENGTH):
        assert held[..., t, : min(protection.sinks, t + 1)].all()
        assert held[..., t, max(t + 1 - protection.recent, 0) : t + 1].all()


@pytest.mark.parametrize(("name", "prefill"), list(product(POLICIES.names(), PREFILLS)))
def test_a_budget_of_the_whole_length_is_the_full_cache(name: str, prefill: str) -> None:
    rows = attention(4, 2, 4, LENGTH)
    scan = run(policy(name), rows, [LENGTH, LENGTH + 5], kv_heads=2, prompt=PROMPT, prefill=prefill)
    full = run(policy("full"), rows, [LENGTH], kv_heads=2, prompt=PROMPT, prefill=prefill)
    assert torch.equal(scan.held(0, LENGTH)[:1], full.held(0, LENGTH))
    assert (scan.evictions == 0).all()


@pytest.mark.parametrize(("name", "prefill"), list(product(POLICIES.names(), PREFILLS)))
def test_the_future_changes_nothing_before_it(name: str, prefill: str) -> None:
    rows = attention(5, 2, 4, LENGTH)
    cut = 33
    whole = run(policy(name), rows, [BUDGET], kv_heads=2, prompt=PROMPT, prefill=prefill)
    part = run(policy(name), rows[..., :cut, :cut], [BUDGET], kv_heads=2, prompt=PROMPT, prefill=prefill)
    assert torch.equal(whole.held(0, cut), part.held(0, cut))


@pytest.mark.parametrize("name", POLICIES.names())
def test_the_same_twice_and_alone(name: str) -> None:
    """State that leaks from one sequence to the next would change the second run."""
    made = policy(name)
    other, rows = attention(6, 2, 4, LENGTH), attention(7, 2, 4, LENGTH)
    alone = run(policy(name), rows, [BUDGET], kv_heads=2, prompt=PROMPT, prefill="stream")
    run(made, other, [BUDGET], kv_heads=2, prompt=PROMPT, prefill="stream")
    after = run(made, rows, [BUDGET], kv_heads=2, prompt=PROMPT, prefill="stream")
    assert torch.equal(alone.leave, after.leave)


@pytest.mark.parametrize("name", [n for n in POLICIES.names() if n != "random"])
def test_swapping_heads_swaps_the_result(name: str) -> None:
    """A policy that draws by head number (random) is the only one whose heads are not interchangeable."""
    rows = attention(8, 1, 4, LENGTH)
    made = run(policy(name), rows, [BUDGET], kv_heads=4, prompt=PROMPT, prefill="full")
    if policy(name).needs - {"weights"}:
        pytest.fail("teach tests/replay/maps.py to permute this policy's signals")
    order = [2, 0, 3, 1]
    swapped = run(policy(name), rows[:, order], [BUDGET], kv_heads=4, prompt=PROMPT, prefill="full")
    assert torch.equal(made.held(0, LENGTH)[:, :, order], swapped.held(0, LENGTH))


@pytest.mark.parametrize("name", POLICIES.names())
def test_every_policy_describes_itself(name: str) -> None:
    (row,) = describe(name)
    assert row["summary"].endswith(".") and row["paper"]
    assert all(parameter["help"] for parameter in row["parameters"])


@pytest.mark.parametrize("name", POLICIES.names())
def test_the_label_is_a_record(name: str) -> None:
    assert policy(name).label == name

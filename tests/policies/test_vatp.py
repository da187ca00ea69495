"""VATP over each base against its plain-loop references, and the published mask."""

import itertools

import numpy as np
import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.engine.plan import EvictionPlan
from kvscope.policies.spec import parse_policies, parse_policy
from tests.engine.maps import attention, run, signals
from tests.policies.decisions import GOLDEN, HEADS, LENGTH, PROMPTS_BUDGETS, golden, golden_rows, heads_at, sets
from tests.reference.policies import vatp as reference

BASES = ["h2o", "tova", "a2sf(alpha=0.7)", "scissorhands"]
USER = """
from dataclasses import dataclass
from kvscope.policies import Policy, Protection, parameter

@dataclass(frozen=True)
class Sum(Policy):
    \"\"\"Sums.\"\"\"

    keep: int = parameter(0, "newest")

    def protect(self, budget):
        return Protection(recent=self.keep)

    def observe(self, step, score):
        return score + step.weights()
"""


@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("base", BASES)
def test_the_base_sees_weights_times_norms(base: str, norm: str, prefill: str) -> None:
    for sinks, (heads, groups) in zip((20, 1, 0), HEADS, strict=True):
        policy = parse_policy(f"vatp:base={base},norm={norm},sinks={sinks}")
        whole = policy.traits.scope == "layer"
        for seed, (prompt, budget) in enumerate(PROMPTS_BUDGETS):
            rows = attention(seed, 2, heads, LENGTH)
            given = signals(EvictionPlan.published(policy), 2, heads, groups, LENGTH, seed)
            simulation = run(policy, rows, [budget], kv_heads=groups, prompt=prompt, prefill=prefill, given=given)
            norms = given[f"value_{norm}"].repeat_interleave(heads // groups, 1).numpy()
            for layer, group in itertools.product(range(2), range(groups)):
                own = slice(0, heads) if whole else slice(group * heads // groups, (group + 1) * heads // groups)
                shared = rows[layer, own].numpy()
                name = base.partition("(")[0]
                visible, held = reference.plain(shared, norms[layer, own], name, budget, prompt, prefill, sinks)
                assert sets(simulation.visible(0, LENGTH)[0, layer, group]) == visible
                assert sets(simulation.held(0, LENGTH)[0, layer, group]) == held


@pytest.mark.parametrize("valued", [True, False])
@pytest.mark.parametrize("base", ["h2o", "scissorhands"])
@pytest.mark.parametrize(("prompt", "half", "sinks"), [(40, 10, 3), (40, 10, 0), (30, 7, 20), (12, 8, 1), (1, 9, 2)])
def test_the_published_mask_in_four_modes(base: str, valued: bool, prompt: int, half: int, sinks: int) -> None:
    length = 60
    recent = half if base == "h2o" else 10
    text = f"sinks={sinks}" if valued else "norm=none,sinks=0"
    policy = parse_policy(f"vatp:variant=mask,base={base},{text}")
    for seed, heads in enumerate((2, 3)):
        rows = attention(seed, 2, heads, length)
        norms = np.random.default_rng(seed).uniform(0.5, 3, size=(2, heads, length))
        given = {"value_l1": torch.from_numpy(norms)} if valued else {}
        simulation = run(policy, rows, [2 * half], kv_heads=heads, prompt=prompt, prefill="full", given=given)
        for layer, head in itertools.product(range(2), range(heads)):
            norm = norms[layer, head] if valued else None
            one = rows[layer, head : head + 1].numpy()
            seen = reference.mask(one, norm, base, 2 * half - recent, recent, sinks, prompt)
            assert sets(simulation.visible(0, length)[0, layer, head]) == seen


def test_the_mask_counts_the_last_400_rows_of_the_prompt() -> None:
    length, prompt, budget = 430, 415, 30
    rows = attention(2, 1, 1, length)
    norms = np.random.default_rng(2).uniform(0.5, 3, size=(1, 1, length))
    policy = parse_policy("vatp:variant=mask,base=scissorhands,sinks=2")
    given = {"value_l1": torch.from_numpy(norms)}
    simulation = run(policy, rows, [budget], kv_heads=1, prompt=prompt, prefill="full", given=given)
    seen = reference.mask(rows[0].numpy(), norms[0, 0], "scissorhands", budget - 10, 10, 2, prompt)
    assert sets(simulation.visible(prompt, length)[0, 0, 0]) == seen[prompt:]
    whole = reference.mask(
        rows[0, :, 15:, 15:].numpy(), norms[0, 0, 15:], "scissorhands", budget - 10, 10, 2, prompt - 15
    )
    assert [{key + 15 for key in keys} for keys in whole[prompt - 15 :]] != seen[prompt:]


@pytest.mark.parametrize("spec", ["vatp:variant=mask,sinks=1", "vatp:sinks=1", "vatp:base=h2o(recent=3),sinks=1"])
def test_golden(spec: str) -> None:
    expected = golden("vatp over h2o", "mask")
    rows = golden_rows(21)
    norms = [[0.5 + (53 * k + 31 * h) % 19 / 10 for k in range(21)] for h in range(2)]
    assert [row[:20] for row in norms] == [pytest.approx(row) for row in GOLDEN["value_l1"]]
    given = {"value_l1": torch.tensor([norms], dtype=torch.float64)}
    simulation = run(parse_policy(spec), rows, [6], kv_heads=2, prompt=12, prefill="full", given=given)
    for step, keys in expected["visible"].items():
        assert heads_at(simulation.visible(0, 21), int(step)) == keys


def test_traits_come_from_the_base() -> None:
    tova = parse_policy("vatp:base=tova,norm=l2").traits
    assert tova.scope == "layer" and tova.needs == {"weights", "value_l2"} and not tova.reads
    assert parse_policy("vatp:norm=none").traits.needs == {"weights"}
    published = parse_policy("vatp:variant=mask").traits
    assert published.reads and published.published and published.prefills == {"full"}


def test_protection_is_that_of_both() -> None:
    kept = parse_policy("vatp:base=h2o(recent=5)").protect(40)
    assert (kept.sinks, kept.recent) == (10, 5)
    assert parse_policy("vatp:sinks=3").protect(40).sinks == 3


def test_labels_say_the_base_and_can_be_read_back() -> None:
    made = parse_policies(["vatp", "vatp:base=a2sf(recent=4,alpha=0.7),norm=l2", "vatp:base=tova"])
    assert [policy.label for policy in made] == [
        "vatp",
        "vatp(base=a2sf(alpha=0.7, recent=4), norm=l2)",
        "vatp(base=tova)",
    ]
    assert parse_policies([policy.label for policy in made]) == made
    with pytest.raises(UsageError, match="named twice"):
        parse_policies(["vatp", "vatp:base=h2o(group=mean)"])


def test_a_base_from_a_file(tmp_path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(USER)
    policy = parse_policy(f"vatp:sinks=0,base={file}:Sum(keep=2)")
    assert policy.protect(8).recent == 2
    rows = attention(1, 2, 4, 20)
    mine = run(policy, rows, [6], kv_heads=2, prompt=5, prefill="full")
    known = run(parse_policy("vatp:sinks=0,base=h2o(recent=2)"), rows, [6], kv_heads=2, prompt=5, prefill="full")
    assert torch.equal(mine.state.leave, known.state.leave)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ("base=vatp", "it multiplies weights itself"),
        ("base=window", "it does not read weights"),
        ("base=key-norm(variant=l2compress)", "it does not read weights"),
        ("base=full", "it does not read weights"),
        ("base=tvoa", "no policy is called 'tvoa'"),
        ("base=a2sf(beta=1)", "policy a2sf has no parameter 'beta'"),
        ("base=tova,variant=mask", "variant=mask cannot use the base tova"),
        ("sinks=-1", "sinks=-1 is out of range"),
    ],
)
def test_what_is_refused(settings: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_policy(f"vatp:{settings}")
    assert why in caught.value.what


def test_budgets_without_a_rule() -> None:
    for base, budget in (("h2o", 1), ("scissorhands", 10)):
        with pytest.raises(UsageError, match=f"no rule for a budget of {budget}"):
            parse_policy(f"vatp:variant=mask,base={base}").protect(budget)


def test_budgets_in_one_scan_equal_one_by_one() -> None:
    rows = attention(5, 2, 4, 40)
    for spec in ("vatp", "vatp:base=scissorhands", "vatp:variant=mask,sinks=2"):
        together = run(parse_policy(spec), rows, [4, 11, 18], kv_heads=2, prompt=10, prefill="full")
        for index, budget in enumerate([4, 11, 18]):
            alone = run(parse_policy(spec), rows, [budget], kv_heads=2, prompt=10, prefill="full")
            assert torch.equal(together.visible(0, 40)[index], alone.visible(0, 40)[0])

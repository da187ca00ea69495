"""A tuned policy does for each head exactly what its setting does alone, and its file is checked before it is used."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from kvscope.core.errors import UsageError
from kvscope.engine.plan import EvictionPlan
from kvscope.engine.simulation import CacheSimulation
from kvscope.policies.base import Policy, Step
from kvscope.policies.spec import parse_policies, parse_policy
from kvscope.policies.tuned import Tuned
from tests.engine.maps import attention, run, signals

LAYERS, HEADS, GROUPS, LENGTH, PROMPT = 3, 4, 2, 46, 36
CHOICE = ((0, 1), (2, 0), (1, 1))
GRIDS = [
    ["a2sf:alpha=0", "a2sf:alpha=0.5", "a2sf:alpha=1"],
    ["h2o", "h2o:group=max", "h2o:group=sum"],
    ["scissorhands:history=2", "scissorhands", "scissorhands:history=7"],
    ["roco:std_ratio=0,recent=1", "roco:std_ratio=0.5,recent=1", "roco:recent=1"],
    ["keyformer", "keyformer:tau_init=0.2", "keyformer:seed=3"],
    ["morphkv", "morphkv:fuse=sum", "morphkv:window=90"],
    ["snapkv:kernel=1", "snapkv:pooling=max", "snapkv"],
    ["cake:gamma=0", "cake", "cake:gamma=5,kernel=1"],
    ["r-kv:mix_lambda=1", "r-kv", "r-kv:mix_lambda=0.5"],
    ["random", "random:seed=1", "random:seed=2"],
    ["vatp:base=a2sf(alpha=0.2)", "vatp:base=a2sf(alpha=0.9)", "vatp:base=a2sf(alpha=0.9,group=max)"],
    ["h2o:variant=flexgen", "h2o:variant=flexgen,group=max", "h2o:variant=flexgen,group=sum"],
]


def tuned(specs: list[str], choice: tuple[tuple[int, ...], ...] = CHOICE) -> Tuned:
    return Tuned("t.toml", tuple(map(parse_policy, specs)), tuple(range(len(choice))), choice)


def simulated(
    policy: Policy, budget: int, prefill: str, given: Mapping[str, torch.Tensor], accumulate: str | None
) -> CacheSimulation:
    plan = EvictionPlan.make(policy, accumulate=accumulate)
    rows = attention(4, LAYERS, HEADS, LENGTH)
    at = {"kv_heads": GROUPS, "prompt": PROMPT, "prefill": prefill}
    return run(plan, rows, [budget], given=dict(given), **at)


@pytest.mark.parametrize("accumulate", [None, "float16"])
@pytest.mark.parametrize("specs", GRIDS, ids=lambda specs: specs[0])
def test_every_head_follows_its_setting(specs: list[str], accumulate: str | None) -> None:
    policies = [parse_policy(spec) for spec in specs]
    given = signals(EvictionPlan.published(policies[0]), LAYERS, HEADS, GROUPS, LENGTH)
    differs = 0
    for prefill in sorted(policies[0].traits.prefills):
        for budget in (5, 13):
            try:
                EvictionPlan.published(policies[0]).require(prefill)
            except UsageError:
                continue  # compresses at the end of the prompt alone
            alone = [simulated(policy, budget, prefill, given, accumulate).state.leave[0] for policy in policies]
            together = simulated(tuned(specs), budget, prefill, given, accumulate).state.leave[0]
            for layer, row in enumerate(CHOICE):
                for head, number in enumerate(row):
                    assert torch.equal(together[layer, head], alone[number][layer, head])
            differs += sum(not torch.equal(alone[0], other) for other in alone[1:])
    assert differs > 0, "the settings are one, so nothing was compared"


@pytest.mark.parametrize("specs", [["tova", "tova:group=max"], ["a2sf:alpha=0", "a2sf:alpha=1"]])
def test_one_number_for_a_layer(specs: list[str]) -> None:
    """Of a policy that decides per layer there is nothing else."""
    alone = [simulated(parse_policy(spec), 9, "full", {}, None).state.leave[0] for spec in specs]
    together = simulated(tuned(specs, ((0,), (1,), (1,))), 9, "full", {}, None).state.leave[0]
    assert torch.equal(together, torch.stack([alone[0][0], alone[1][1], alone[1][2]]))


@dataclass(frozen=True)
class _InPlace(Policy):
    """A user's policy that writes into the scores it is given."""

    name = "in-place"
    fade: float = 0.5

    def observe(self, step: Step, score: torch.Tensor) -> torch.Tensor:
        return score.mul_(self.fade).add_(step.weights())


def test_a_policy_that_writes_into_its_scores() -> None:
    settings = (_InPlace(0.1), _InPlace(0.5), _InPlace(0.99))
    alone = [simulated(policy, 9, "full", {}, None).state.leave[0] for policy in settings]
    together = simulated(Tuned("t.toml", settings, (0, 1, 2), CHOICE), 9, "full", {}, None).state.leave[0]
    for layer, row in enumerate(CHOICE):
        for head, number in enumerate(row):
            assert torch.equal(together[layer, head], alone[number][layer, head])


def test_budgets_side_by_side_and_layers_apart() -> None:
    """State that leaks between budgets, layers or sequences would change a decision."""
    policy, rows = tuned(GRIDS[0]), attention(5, LAYERS, HEADS, LENGTH)
    at = {"kv_heads": GROUPS, "prompt": PROMPT, "prefill": "full"}
    both = run(policy, rows, [6, 15], **at)
    for index, budget in enumerate([6, 15]):
        assert torch.equal(both.state.leave[index], run(policy, rows, [budget], **at).state.leave[0])
    last = run(tuned(GRIDS[0], CHOICE[2:]), rows[2:], [6], **at)
    assert torch.equal(both.state.leave[0, 2], last.state.leave[0, 0])


def test_what_it_is() -> None:
    policy = tuned(["a2sf:alpha=0.1", "a2sf:alpha=0.9", "a2sf"])
    assert policy.label == "a2sf(@t.toml)"
    assert policy.traits == parse_policy("a2sf").traits
    parameters = policy.parameters()
    assert [own["alpha"] for own in parameters["settings"]] == [0.1, 0.9, 0.2]
    assert parameters["choice"] == [[0, 1], [2, 0], [1, 1]] and parameters["layers"] == [0, 1, 2]
    assert tuned(["h2o", "h2o:group=max"], ((1,),)).protect(9) == parse_policy("h2o").protect(9)


@pytest.mark.parametrize(
    ("specs", "changes", "why"),
    [
        (["a2sf", "h2o"], {}, "the settings differ in policy"),
        (["tova", "tova:scope=kv_head"], {}, "the settings differ in policy"),
        (["h2o:variant=mask"] * 2, {}, "has no budget"),
        (["scissorhands:variant=released"] * 2, {}, "has no budget"),
        (["quest"] * 2, {}, "has no budget"),
        (["a2sf"] * 2, {"choice": ((0, 2), (0, 0), (0, 0))}, "does not match the layers and settings"),
        (["a2sf"] * 2, {"choice": ((0, -1), (0, 0), (0, 0))}, "does not match the layers and settings"),
        (["a2sf"] * 2, {"choice": ((0, 1), (), (0, 0))}, "does not match the layers and settings"),
        (["a2sf"] * 2, {"layers": (0, 1)}, "does not match the layers and settings"),
        (["a2sf"] * 2, {"layers": (), "choice": ()}, "does not match the layers and settings"),
        (["a2sf"] * 2, {"settings": (), "choice": (), "layers": ()}, "does not match the layers and settings"),
    ],
)
def test_what_cannot_stand_side_by_side(specs: list[str], changes: dict, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        replace(tuned(specs, ((0, 1), (0, 0), (1, 1))), **changes)


def test_settings_that_protect_different_keys_are_refused_where_they_do() -> None:
    policy = tuned(["snapkv:window=8", "snapkv:window=16"], ((0, 1),))
    assert policy.protect(10).recent == 5
    with pytest.raises(UsageError, match="at 40 keys the settings protect different keys"):
        policy.protect(40)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (((0, 1, 2), 2, 3), None),
        (((0, 2), 2, 4), None),
        (((0, 1, 2), 3, 3), "not for 3 key/value heads"),
        (((0, 1, 3), 2, 4), "not for layer 3"),
        (((0, 1), 2, 2), "for layer 2, of 2 in the model"),
    ],
)
def test_another_model(model: tuple[tuple[int, ...], int, int], why: str | None) -> None:
    policy = tuned(["a2sf", "a2sf:alpha=1"], ((0, 1), (0,), (1, 1)))
    if why is None:
        policy.fit(*model)
        return
    with pytest.raises(UsageError, match=f"t.toml was tuned {why}"):
        policy.fit(*model)


def test_another_model_found_at_the_first_step() -> None:
    with pytest.raises(UsageError, match="not for layer 2"):
        simulated(tuned(["a2sf", "a2sf:alpha=1"], ((0, 1), (0,))), 9, "full", {}, None)


def test_a_layer_that_decides_as_one_has_one_setting() -> None:
    tuned(["tova", "tova:group=max"], ((0,), (1,))).fit((0, 1), 8, 2)
    with pytest.raises(UsageError, match="not for 1 key/value heads"):
        tuned(["tova", "tova:group=max"], ((0, 1), (1, 1))).fit((0, 1), 2, 2)


GOOD = """
policy = "a2sf"
layers = [0, 1]
choice = [[0, 1], [1, 1]]

[[settings]]
alpha = 0.1

[[settings]]
recent = 0
normalise = "lifetime"
"""


def test_a_file_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "by hand.toml"
    file.write_text(GOOD)
    (made,) = parse_policies([f"a2sf:@{file}"])
    settings = parse_policy("a2sf:alpha=0.1"), parse_policy("a2sf:normalise=lifetime")
    assert made == Tuned("by hand.toml", settings, (0, 1), ((0, 1), (1, 1)))
    assert parse_policy(f" a2sf : @{file} ") == made


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('policy = "a2sf"', 'policy = "h2o"', "tunes h2o, not a2sf"),
        ("layers = [0, 1]", "", "is not a result of kvscope tune: it lacks 'layers'"),
        ('policy = "a2sf"', "", "is not a result of kvscope tune: it lacks 'policy'"),
        ("layers = [0, 1]", "layers = 2", "is not a result of kvscope tune"),
        ("layers = [0, 1]", "layers = [0, 1", "is not a result of kvscope tune"),
        ("[[0, 1], [1, 1]]", "[[0, 1.5], [1, 1]]", "1.5 is not a whole number"),
        ("[[0, 1], [1, 1]]", "[[0, true], [1, 1]]", "True is not a whole number"),
        ("[[0, 1], [1, 1]]", "[0, 1]", "is not a result of kvscope tune"),
        ("[[0, 1], [1, 1]]", "[[0, 1], [1, 2]]", "does not match the layers and settings"),
        ("[[0, 1], [1, 1]]", "[[0, 1], [1, -1]]", "does not match the layers and settings"),
        ("[[0, 1], [1, 1]]", "[[0, 1]]", "does not match the layers and settings"),
        ("[[0, 1], [1, 1]]", "[]", "does not match the layers and settings"),
        ("alpha = 0.1", "alhpa = 0.1", "policy a2sf has no parameter 'alhpa'"),
        ("alpha = 0.1", 'alpha = "much"', "a2sf: alpha='much' is not float"),
        ("alpha = 0.1", "alpha = 7", "alpha=7.0 is out of range"),
        ("recent = 0", "recent = 0.5", "a2sf: recent='0.5' is not int"),
        ("recent = 0", "recent = true", "a2sf: recent='true' is not int"),
        ("recent = 0", "recent = 4", None),
        ("[[settings]]", "[settings]", "is not a result of kvscope tune"),
        ("[[settings]]\nalpha = 0.1", "settings = [3]", "is not a result of kvscope tune"),
    ],
)
def test_a_file_that_was_edited(tmp_path: Path, old: str, new: str, why: str | None) -> None:
    file = tmp_path / "t.toml"
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    file.write_text(text if new != "settings = [3]" else text.split("\n\n[[settings]]\nrecent")[0])
    if why is None:
        made = parse_policy(f"a2sf:@{file}")
        with pytest.raises(UsageError, match="protect different keys"):
            made.protect(20)
        return
    with pytest.raises(UsageError) as caught:
        parse_policy(f"a2sf:@{file}")
    assert why in caught.value.what
    assert caught.value.todo


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none.toml", "cannot read"), (tmp_path, "cannot read")):
        with pytest.raises(UsageError, match=why):
            parse_policy(f"a2sf:@{path}")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not a result of kvscope tune"):
        parse_policy(f"a2sf:@{tmp_path / 'bytes.toml'}")
    with pytest.raises(UsageError, match="no policy is called 'a2fs'"):
        parse_policy(f"a2fs:@{tmp_path / 'bytes.toml'}")


def test_a_policy_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        '''
from dataclasses import dataclass
from kvscope.policies import Policy, parameter

@dataclass(frozen=True)
class Mine(Policy):
    """Sums that fade."""

    fade: float = parameter(0.9, "what is left")

    def observe(self, step, score):
        return step.weights() + self.fade * score
'''
    )
    text = GOOD.replace('"a2sf"', '"Mine"').replace("alpha", "fade").replace('recent = 0\nnormalise = "lifetime"', "")
    (tmp_path / "t.toml").write_text(text)
    made = parse_policy(f"{tmp_path / 'mine.py'}:Mine:@{tmp_path / 't.toml'}")
    assert isinstance(made, Tuned)
    assert [policy.fade for policy in made.settings] == [0.1, 0.9]  # type: ignore[attr-defined]
    assert made.label == "Mine(@t.toml)"

"""Variants: published codes that differ from a policy's plain rule, each a class and a file of its own."""

import ast
import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import kvscope
from kvscope.core.errors import UsageError
from kvscope.policies import POLICIES
from kvscope.policies.base import VARIANTS, Policy, variant
from kvscope.policies.describe import describe
from kvscope.policies.h2o import H2O
from kvscope.policies.h2o_mask import H2OMask
from kvscope.policies.spec import parse_policies, parse_policy
from kvscope.policies.window import Window

PACKAGE = Path(kvscope.__file__).parent
OWN = [name for name, cls in VARIANTS.items() if cls.__module__.startswith("kvscope.policies.")]
EXPECTED = {
    "a2sf:variant=streaming-mask",
    "h2o:variant=flexgen",
    "h2o:variant=mask",
    "key-norm:variant=l2compress",
    "roco:variant=easykv",
    "scissorhands:variant=released",
    "tova:variant=kvpress",
    "vatp:variant=mask",
}


def test_there_are_variants() -> None:
    assert set(OWN) == EXPECTED


@pytest.mark.parametrize("spec", OWN)
def test_a_variant_is_stored_as_its_policy_with_a_parameter(spec: str) -> None:
    """Runs of two replays are matched by these, so a class of its own must not change them."""
    name, _, chosen = spec.partition(":variant=")
    made, plain = parse_policy(spec), parse_policy(name)
    assert type(made) is VARIANTS.get(spec) and type(plain) is POLICIES.get(name)
    assert (made.name, made.label) == (name, f"{name}(variant={chosen})")
    assert made.parameters() == plain.parameters() | {"variant": chosen}
    assert parse_policy(made.label) == made != plain
    assert made.traits.published and not plain.traits.published


def test_the_parameters_that_are_stored() -> None:
    made = parse_policy("h2o:recent=3")
    assert made.parameters() == {"recent": 3, "group": "mean", "reduce": "scores", "variant": "drop"}
    made = parse_policy("scissorhands:lru_window=7,variant=released")
    assert made.label == "scissorhands(variant=released, lru_window=7)"
    assert list(parse_policy("scissorhands").parameters()) == [
        *("history", "recent", "group", "reduce", "variant", "lru_window", "position_window", "start")
    ]


def test_a_shared_parameter_chooses_the_variant() -> None:
    mask, window = parse_policies(["h2o", "window"], {"variant": "mask", "recent": "2"})
    assert mask == H2OMask(recent=2) and window == Window()


@pytest.mark.parametrize("name", sorted({spec.partition(":")[0] for spec in OWN}))
def test_an_unknown_variant(name: str) -> None:
    choices = " \\| ".join(describe(name)[0]["variants"])
    with pytest.raises(UsageError, match=f"{name}: variant='x' is not {choices}"):
        parse_policy(f"{name}:variant=x")


def test_the_class_of_the_plain_rule_has_no_variants() -> None:
    with pytest.raises(UsageError, match="H2O takes no variant") as caught:
        H2O(variant="mask")  # type: ignore[call-arg]
    assert "'h2o:variant=mask'" in caught.value.todo
    assert replace(H2OMask(recent=1), recent=2) == H2OMask(recent=2)


@pytest.mark.parametrize("spec", OWN)
def test_a_variant_says_what_it_reproduces_and_shows_it_at_work(spec: str) -> None:
    own = vars(VARIANTS.get(spec))
    assert own["proven"] and len(own["proven"]) <= 60
    assert own["__doc__"].startswith("Reproduce ") and "held(" in own["__doc__"]
    (row,) = describe(spec.partition(":")[0])
    assert f"``variant={spec.partition('=')[2]}``: Reproduce" in row["doc"]


NEW = '''
from dataclasses import dataclass
from kvscope.policies.{module} import {base}
from kvscope.policies.base import parameter, variant, variant_parameter

@variant("{policy}", "later")
@dataclass(frozen=True)
class Later({base}):
    """Reproduce nothing."""
    {field}
    delay: int = parameter(3, "later: steps to wait")
'''


@pytest.mark.parametrize(
    ("policy", "base", "field", "choices"),
    [
        ("h2o", "H2O", "", ["drop", "flexgen", "later", "mask"]),
        ("window", "Window", "variant: str = variant_parameter()", ["plain", "later"]),
    ],
)
def test_a_new_variant_is_one_new_file(policy: str, base: str, field: str, choices: list[str], tmp_path: Path) -> None:
    text = NEW.format(module=policy, base=base, policy=policy, field=field)
    (tmp_path / f"{policy}_later.py").write_text(text)
    code = f"""
import kvscope.policies
kvscope.policies.__path__.append({str(tmp_path)!r})
from kvscope.policies.describe import describe
from kvscope.policies.spec import parse_policies
row, = describe({policy!r})
assert row["variants"] == {choices}, row["variants"]
assert "delay" in [item["name"] for item in row["parameters"]]
made, plain = parse_policies(["{policy}:variant=later", {policy!r}], {{"delay": "5"}})
assert made.label == "{policy}(variant=later, delay=5)", made.label
assert plain.label == {policy!r} and "delay" not in plain.parameters()
assert parse_policies(["{policy}:variant={choices[0]}"]) == [plain]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_variant_needs_a_field_for_its_name() -> None:
    with pytest.raises(UsageError, match="has no field for its name"):

        @variant("window", "other")
        class Other(Window):
            """Another."""

    assert "window:variant=other" not in VARIANTS.names()


# Names that stand elsewhere for another reason: a default, what a variant is about, an allocation, a module of a model.
ELSEWHERE = {
    "a2sf": {"cli/tune.py"},
    "attention-gate": {"experiments/paper.py"},
    "cake": {"engine/allocators.py"},
    "h2o": {"policies/vatp.py", "policies/vatp_mask.py", "policies/members.py"},
    "indexer": {"model/model_facts.py"},
    "scissorhands": {"policies/vatp_mask.py"},
    "snapkv": {"policies/criticalkv.py"},
    "tova": {"policies/members.py"},
}
# Bounds and baselines, which reports and metrics single out, and words with other meanings.
WORDS = {"belady", "blend", "full", "ideal", "random", "window"}


def mentions(file: Path) -> set[str]:
    """Return the names of policies that stand in the code of a file as text."""
    texts = {
        node.value
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return {name for name, _ in POLICIES.items() if name in texts}


def test_a_policy_is_named_in_its_own_file_alone() -> None:
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        for name in mentions(file) - WORDS:
            found.setdefault(name, set()).add(str(file.relative_to(PACKAGE)))
    assert len(found) > 20
    for name, files in found.items():
        own = {POLICIES.get(name), *(cls for _, cls in VARIANTS.items() if cls.name == name)}
        expected = {f"policies/{cls.__module__.rpartition('.')[2]}.py" for cls in own} | ELSEWHERE.get(name, set())
        assert files <= expected, f"{name} is also named in {files - expected}"


def code_lines(cls: type[Policy]) -> int:
    """Return the lines of a class with code on them: without blank ones, docstring, publication and formula."""
    lines = inspect.getsource(cls).splitlines()
    (made,) = (node for node in ast.walk(ast.parse("\n".join(lines))) if isinstance(node, ast.ClassDef))
    no_rule = [
        made.body[0],
        *(node for node in made.body if ast.unparse(node).startswith(("citation = ", "formula = "))),
    ]
    skipped = {line for node in no_rule for line in range(node.lineno - 1, node.end_lineno or node.lineno)}
    return sum(bool(line.strip()) and at not in skipped for at, line in enumerate(lines))


@pytest.mark.parametrize(("name", "most"), [("tova", 30), ("h2o", 30), ("a2sf", 30), ("vatp", 40)])
def test_a_plain_rule_is_short(name: str, most: int) -> None:
    assert code_lines(POLICIES.get(name)) <= most

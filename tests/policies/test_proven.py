"""Every policy of the package says what its decisions are compared with, and that is so."""

import importlib.util
import inspect
from pathlib import Path

import pytest

from kvscope.policies import POLICIES
from kvscope.policies.parameters import rules_of
from kvscope.policies.spec import parse_policy
from tests.policies.test_authors_decisions import CASES

OWN = [name for name, cls in POLICIES.items() if cls.__module__.startswith("kvscope.policies.")]
RULES = [name for name in OWN if not getattr(POLICIES.get(name), "clairvoyant", False)]  # the others are bounds
HERE = Path(__file__).parent
PROOFS = (
    "authors' decisions",
    "authors' code, read",
    "kvpress's decisions",
    "kvpress's code, read",
    "paper",
    "own rule",
    "the model's decisions",
)
GOLDEN_RULES = {  # those of the golden cases, which the tests of each policy read
    *("h2o", "h2o:variant=mask", "a2sf", "a2sf:variant=streaming-mask", "tova", "scissorhands:variant=released"),
    "vatp:variant=mask",
}
COMPARED = {type(parse_policy(case["policy"])) for case in CASES} | {type(parse_policy(spec)) for spec in GOLDEN_RULES}
ELSEWHERE = {
    "full": "test_trivial.py",
    "window": "test_trivial.py",
    "random": "test_trivial.py",
    "refreshkv": "test_recycled_attention.py",
}


def written_for(name: str) -> str:
    file = ELSEWHERE.get(name, f"test_{name.replace('-', '_')}.py")
    return (HERE / file).read_text()


def test_there_are_policies() -> None:
    assert len(OWN) >= 24 and set(ELSEWHERE) <= set(OWN)


@pytest.mark.parametrize("name", OWN)
def test_every_policy_has_tests_and_a_plain_loop(name: str) -> None:
    text = written_for(name)
    assert name in text or POLICIES.get(name).__name__ in text
    assert "from tests.reference.policies" in text


@pytest.mark.parametrize("name", OWN)
def test_what_it_is_proven_against(name: str) -> None:
    own = vars(POLICIES.get(name)).get("proven", "")
    assert own, f"{name} inherits its proof or has none"
    assert 0 < len(POLICIES.get(name).formula) <= 100
    assert len(own) <= 60, "a phrase"
    if name not in RULES:
        return
    for cls in rules_of(POLICIES.get(name)).values():
        assert cls.proven in PROOFS, cls.__name__
        assert (cls.proven == "authors' decisions") == (cls in COMPARED), cls.__name__


@pytest.mark.parametrize("name", RULES)
def test_the_docstring_says_where_it_is_from_and_shows_it_at_work(name: str) -> None:
    cls = POLICIES.get(name)
    doc = inspect.getdoc(cls) or ""
    assert ">>> held(" in doc, f"{name} has no worked example"
    source = vars(cls).get("paper", "")
    assert source
    if "arXiv:" in source:
        assert source[source.index("arXiv:") :][:16] in doc, "the paper is named where the rule is"
        assert "code" in doc, "the docstring names the code, or says that there is none"


def test_the_table_of_policies_holds_them_all_and_is_generated() -> None:
    root = HERE.parents[1]
    found = importlib.util.spec_from_file_location("docs_tool", root / "tools" / "docs.py")
    assert found is not None and found.loader is not None
    docs = importlib.util.module_from_spec(found)
    found.loader.exec_module(docs)
    page = docs.generated()["docs/policies/README.md"]
    assert page == (root / "docs" / "policies" / "README.md").read_text(encoding="utf-8")
    table = page.partition("\n| policy | decides per |")[2]
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| [`")] == sorted(OWN)

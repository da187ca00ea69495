"""Every policy of the package says what its decisions are compared with, and that is so."""

import importlib.util
import inspect
from pathlib import Path

import pytest

from kvscope.policies import POLICIES
from kvscope.policies.describe import describe
from tests.policies.decisions import GOLDEN

OWN = [name for name, cls in POLICIES.items() if cls.__module__.startswith("kvscope.policies.")]
RULES = [name for name in OWN if not getattr(POLICIES.get(name), "clairvoyant", False)]  # the others are bounds
HERE = Path(__file__).parent
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
    assert len(own) <= 60, "a phrase"
    proven = describe(name)[0]["proven"]  # with what its variants are compared with
    if name not in RULES:
        return
    vectors = any(case["policy"].split()[0] == name and "variant" in case for case in GOLDEN["cases"])
    assert ("authors' decisions" in proven) == vectors
    assert ("authors' decisions" in proven) == ("golden(" in written_for(name))


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


def test_the_table_of_the_readme_holds_them_all_and_is_checked() -> None:
    root = HERE.parents[1]
    found = importlib.util.spec_from_file_location("docs_tool", root / "tools" / "docs.py")
    assert found is not None and found.loader is not None
    docs = importlib.util.module_from_spec(found)
    found.loader.exec_module(docs)
    page = (root / "README.md").read_text(encoding="utf-8")
    table = page.partition("<!-- policies -->")[2].partition("<!-- /policies -->")[0]
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == sorted(OWN)
    assert docs.with_tables(page) == page
    assert docs.with_tables(page.replace("| at every step |", "| now and then |")) == page, "a wrong table is corrected"

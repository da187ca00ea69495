"""The documentation tells the truth, and the check that says so can see a lie."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from tests.test_house import MAY_IMPORT

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def docs() -> ModuleType:
    found = importlib.util.spec_from_file_location("docs", ROOT / "tools" / "docs.py")
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_documentation_is_true(docs: ModuleType) -> None:
    assert list(docs.problems()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("```sh\nkvscope retrace x\n```", "no command retrace"),
        ("```sh\nkvscope replay --alpah 1\n```", "no option --alpah"),
        ("see `kvscope info --depth`", "no option --depth"),
    ],
)
def test_the_check_sees_wrong_commands(docs: ModuleType, text: str, said: str) -> None:
    (line,) = docs._commands(text)
    assert said in line


def test_the_check_sees_broken_links(docs: ModuleType) -> None:
    (line,) = docs._links(ROOT / "README.md", "[a](nowhere.md) [b](LICENSE) [c](https://example.org)")
    assert "nowhere.md" in line


def test_readme_says_what_a_trace_is_in_its_first_paragraph() -> None:
    first = (ROOT / "README.md").read_text().split("\n\n")[1]
    assert "attention" in first
    assert "not the block hashes" in first


def test_the_table_of_rooms_is_the_one_that_the_tests_enforce() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| .* \| ([^|]*) \|$", page, re.MULTILINE)
    stated = {room: set(re.findall(r"`(\w+)`", others)) for room, others in rows}
    enforced = {room: others - {"core"} for room, others in MAY_IMPORT.items() if not room.startswith("__")}
    assert stated == enforced


TERMS = """
    allocation; attend; attention mass; baseline; belady; budget, cache size; closed loop; evict; fallback;
    full prefill, stream prefill; gate; hold; ideal; kv head; lag; late mass; live row; open loop; phase, `--compress`;
    query position; reference; regret; replay; residency interval; retain;
    retained mass; run; scope; sinks; span; sparse reader; step; trace; visible
"""


def test_the_glossary_explains_every_term_in_alphabetical_order() -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n## Glossary\n")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE))
    rows.pop("term")
    assert {" ".join(term.split()) for term in TERMS.split(";")} <= set(rows)
    assert list(rows) == sorted(rows, key=str.lower)
    assert all(len(meaning) > 3 for meaning in rows.values())
